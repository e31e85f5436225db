"""``minitron verify PATH``: hash a checkpoint, engine or repository again, and what it was made from."""

from __future__ import annotations

import argparse
from pathlib import Path

from minitron import console
from minitron.errors import InputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", type=Path, nargs="+", help="folder with a manifest.json of ours")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print a line for each folder and fault; the exit code tells whether all is as recorded."""
    from minitron.artifacts.verify import verify

    findings = [finding for path in args.path for finding in verify(path)]
    failed = any(finding.level == "FAIL" for finding in findings)
    if args.json:
        console.emit_json({"ok": not failed, "findings": [vars(finding) for finding in findings]})
    else:
        for finding in findings:
            print(f"{finding.level:4}  {finding.path}: {finding.message}")
    return InputError.exit_code if failed else 0
