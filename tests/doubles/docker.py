"""A stand-in for ``docker run``, ``docker kill`` and ``docker image inspect``: it knows the flags that the toolkit may
use and no others. Every image is on this machine but the one that DOCKER_DOUBLE_ABSENT names.

The command of the container runs here, with the container's paths turned into those that are mounted. Every command
line is appended to the file that DOCKER_DOUBLE_LOG names. It imports nothing of the toolkit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="docker run", allow_abbrev=False)
    for switch in ("--rm", "--init"):
        made.add_argument(switch, action="store_true")
    for single in ("--name", "--gpus", "--network", "--shm-size", "--user", "--workdir"):
        made.add_argument(single, required=True)
    for several in ("--ulimit", "--env", "--volume"):
        made.add_argument(several, action="append", default=[])
    made.add_argument("image")
    made.add_argument("command", nargs=argparse.REMAINDER)
    return made


def main() -> int:
    if log := os.environ.get("DOCKER_DOUBLE_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(sys.argv[1:]) + "\n")
    if sys.argv[1] == "kill":
        return 0
    if sys.argv[1:3] == ["image", "inspect"]:
        if sys.argv[3] == os.environ.get("DOCKER_DOUBLE_ABSENT"):
            raise SystemExit(f"Error response from daemon: No such image: {sys.argv[3]}")
        print("[]")
        return 0
    if sys.argv[1] != "run":
        raise SystemExit(f"docker: unknown command {sys.argv[1]}")
    args = parser().parse_args(sys.argv[2:])
    if not re.fullmatch(r"[\w.]+(:\d+)?/[\w./-]+:[\w.-]+", args.image):
        raise SystemExit(f"docker: invalid reference format: {args.image}")
    command = args.command
    for volume in args.volume:
        here, there, *_ = volume.split(":")
        if not Path(here).is_absolute() or not Path(here).is_dir():
            raise SystemExit(f"docker: {here} is no folder of this machine")
        command = [re.sub(rf"(?<![\w./-]){re.escape(there)}(?![\w-])", here, word) for word in command]
    environment = dict(pair.split("=", 1) for pair in args.env)
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(command, cwd=folder, env=os.environ | environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
