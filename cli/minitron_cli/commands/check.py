"""``minitron check PATH``: what is wrong with a checkpoint, an engine or a model repository."""

from __future__ import annotations

import argparse
from pathlib import Path

from minitron import console
from minitron.artifacts import manifest
from minitron.artifacts.problem import Problem
from minitron.errors import InputError, RepositoryError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Say what in a model repository cannot work. Of a checkpoint or an engine, and with --hash of a repository "
        "too, hash every byte again: the folder's own, and of all that it was made from."
    )
    parser.add_argument("path", type=Path, nargs="+", metavar="PATH", help="folder with a manifest.json of ours")
    parser.add_argument("--hash", action="store_true", help="hash a model repository too, and what it was made from")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print a line for each problem; the exit code tells whether there is an error, and of which kind."""
    code, problems = 0, list[Problem]()
    for path in args.path:
        found, wrong = _problems_of(path, everything=args.hash)
        problems += found
        code = code or wrong
    if args.json:
        paths = [str(path.absolute()) for path in args.path]
        console.emit_json({"paths": paths, "ok": not code, "findings": [vars(problem) for problem in problems]})
        return code
    for problem in problems:
        print(f"{problem.level:7}  {' '.join(filter(None, (problem.file, problem.field)))}: {problem.message}")
    errors = sum(problem.is_error for problem in problems)
    print(f"{', '.join(map(str, args.path))}: {f'{errors} errors' if errors else 'nothing is wrong'}")
    return code


def _problems_of(path: Path, *, everything: bool) -> tuple[list[Problem], int]:
    """What is to be said about a folder, and the exit code for it."""
    from minitron.artifacts.verify import verify

    problems, code = list[Problem](), 0
    if manifest.stage_of(path) == "repository":
        from minitron_triton.repository.check import check

        problems = check(path)
        code = RepositoryError.exit_code if any(problem.is_error for problem in problems) else 0
        if not everything:
            return problems, code
    hashed = verify(path)
    if any(problem.is_error for problem in hashed):
        code = code or InputError.exit_code
    return [*problems, *hashed], code
