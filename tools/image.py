"""The command that builds an image of the toolkit, from ``deploy/images.yaml``; run where a docker daemon answers.

python tools/image.py serve | builder [--print]
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent


def reference(image: dict[str, Any]) -> str:
    """repository@digest, or repository:tag where no digest is pinned."""
    digest = image["digest"]
    return f"{image['repository']}@{digest}" if digest else f"{image['repository']}:{image['tag']}"


def command(target: str, version: str, revision: str) -> list[str]:
    """``docker buildx build`` of one target, with a bill of materials (BuildKit's scanner, syft) beside it."""
    images = yaml.safe_load((ROOT / "deploy" / "images.yaml").read_text(encoding="utf-8"))
    arguments = {
        "PYTHON_IMAGE": reference(images["python"]), "TRITON_IMAGE": reference(images["triton"]),
        "VERSION": version, "REVISION": revision,
    }  # fmt: skip
    tag = version if target == "serve" else f"{version}-gpu"
    return [
        "docker", "buildx", "build", f"--target={target}", f"--tag=minitron-trtllm:{tag}",
        *(f"--build-arg={name}={value}" for name, value in arguments.items()), "--sbom=true", "--provenance=true", ".",
    ]  # fmt: skip


def main() -> int:
    """Print the command; run it where that can be."""
    parser = argparse.ArgumentParser(description="build an image of the toolkit")
    parser.add_argument("target", choices=("serve", "builder"))
    parser.add_argument("--print", action="store_true", help="run nothing")
    args = parser.parse_args()
    revision = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    words = command(args.target, _version(), revision or "unknown")
    print(shlex.join(words), flush=True)
    if args.print:
        return 0
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        print("No docker daemon answers here; this is the command for a machine that has one.", file=sys.stderr)
        return 0
    return subprocess.run(words, cwd=ROOT, check=False).returncode


def _version() -> str:
    from minitron.version import VERSION

    return VERSION


if __name__ == "__main__":
    sys.exit(main())
