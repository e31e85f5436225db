"""Write docs/cli.md from the command line's own help; ``--check`` only compares and exits with 1 where it differs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"  # argparse wraps help to the terminal; the document must not depend on it

from minitron_trtllm import cli

TARGET = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# The command line

Made by `make docs` from the commands' own help; do not edit.
"""


def document() -> str:
    """The whole page: one section a command, one below it for every subcommand."""
    sections = [HEAD, *(section for name in cli.COMMANDS for section in _sections([name]))]
    return "\n".join(sections)


def _sections(words: list[str]) -> list[str]:
    parser = cli.parser_of(words)
    text = f"{'#' * (len(words) + 1)} minitron {' '.join(words)}\n\n```\n{parser.format_help().rstrip()}\n```\n"
    nested = [
        name for action in parser._actions if isinstance(action, argparse._SubParsersAction) for name in action.choices
    ]
    return [text, *(section for name in nested for section in _sections([*words, name]))]


def main() -> int:
    """Write or check the page."""
    text = document()
    if "--check" in sys.argv[1:]:
        return 0 if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text else 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
