"""Write into docs what the code knows: cli.md from the commands' own help, the lines of an acceptance in a100.md.

``--check`` only compares and exits with 1 where something differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"  # argparse wraps help to the terminal; the document must not depend on it

from minitron.acceptance import catalogue
from minitron_cli import main as cli
from minitron_cli.accept import hour

ACCEPTANCE = Path(__file__).parent.parent / "docs" / "a100.md"
BEGIN, END = "<!-- lines: written by 'make docs' from data/acceptance.yaml -->\n", "<!-- end of lines -->\n"
HOUR, HOUR_END = "<!-- hour: written by 'make docs' from data/hour.yaml -->\n", "<!-- end of hour -->\n"
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


def acceptance_page() -> str:
    """docs/a100.md with the table of lines as the catalogue has it, and that of the hour."""
    rows = [
        f"| `{entry.id}` | {'GPU' if entry.gpu else 'any'} | {entry.what} | {entry.remedy} |"
        for entry in catalogue().values()
    ]
    head = ["| line | target | holds that | after a FAIL |", "|---|---|---|---|"]
    text = _between(ACCEPTANCE.read_text(encoding="utf-8"), BEGIN, END, [*head, *rows])
    return _between(text, HOUR, HOUR_END, hour_table())


def _between(text: str, begin: str, end: str, table: list[str]) -> str:
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + "\n" + "\n".join(table) + "\n\n" + end + after


def hour_table() -> list[str]:
    """The steps of an acceptance with their minutes."""
    rows = [f"| {step.name} | {step.least:g} to {step.most:g} | {step.source} |" for step in hour.steps()]
    return ["| step | minutes | from |", "|---|---|---|", *(row.replace("0.1 to 0.1", "0.1") for row in rows)]


def main() -> int:
    """Write or check the pages."""
    pages = {TARGET: document(), ACCEPTANCE: acceptance_page()}
    if "--check" in sys.argv[1:]:
        return int(any(not path.exists() or path.read_text(encoding="utf-8") != text for path, text in pages.items()))
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
