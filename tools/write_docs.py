"""Write into docs what the code knows: the commands, exit codes and renamed commands in cli.md, the lines of an
acceptance in a100.md, the import graph in architecture.md (read by grimp, drawn by whoever shows Mermaid).

``--check`` only compares and exits with 1 where something differs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp

os.environ["COLUMNS"] = "100"  # argparse wraps help to the terminal; the document must not depend on it

from minitron import errors
from minitron.checks import catalogue
from minitron_cli import main as cli
from minitron_cli.accept import hour

ACCEPTANCE = Path(__file__).parent.parent / "docs" / "a100.md"
BEGIN, END = "<!-- lines: written by 'make docs' from data/acceptance.yaml -->\n", "<!-- end of lines -->\n"
HOUR, HOUR_END = "<!-- hour: written by 'make docs' from data/hour.yaml -->\n", "<!-- end of hour -->\n"
ARCHITECTURE = Path(__file__).parent.parent / "docs" / "architecture.md"
GRAPH, GRAPH_END = "<!-- graph: written by 'make docs' from the imports -->\n", "<!-- end of graph -->\n"
TARGET = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# The command line

Made by `make docs` from the commands' own help; do not edit.
"""


def document() -> str:
    """The whole page: one section a command."""
    sections = [HEAD, _commands(), _exit_codes(), _renamed(), *map(_section, cli.COMMANDS)]
    return "\n".join(sections)


def _commands() -> str:
    rows = [f"| [`{name}`](#minitron-{name}) | {about} |" for name, about in cli.COMMANDS.items()]
    return "\n".join(["| command | what it does |", "|---|---|", *rows, ""])


def _exit_codes() -> str:
    def below(kind: type[errors.MinitronError]) -> Iterator[type[errors.MinitronError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from below(child)

    rows = [f"| {kind.exit_code} | `{kind.__name__}` | {(kind.__doc__ or '').splitlines()[0]} |"
            for kind in sorted(below(errors.MinitronError), key=lambda kind: kind.exit_code)]  # fmt: skip
    rows += [f"| {errors.EXIT_BUG} | | A bug of ours: one line, unless --debug. |",
             f"| {errors.EXIT_INTERRUPTED} | | An interrupt (Ctrl-C). |"]  # fmt: skip
    return "\n".join(
        ["## Exit codes", "", "| code | error | when |", "|---|---|---|", "| 0 | | All went well. |", *rows, ""]
    )


def _renamed() -> str:
    rows = [f"| `minitron {name}` | {what} |" for name, what in cli.RENAMED.items()]
    return "\n".join(["## Commands of version 0.2", "", "| then | now |", "|---|---|", *rows, ""])


def architecture_page() -> str:
    """docs/architecture.md with the graph of the imports: rooms, and the packages inside them."""
    graph = grimp.build_graph(*cli.PACKAGES, cache_dir=None)
    parts = {room: _parts(graph, room) for room in cli.PACKAGES}
    lines = ["```mermaid", "flowchart TB"]
    for room, names in parts.items():
        lines.append(f"  subgraph {room}")
        lines += [f"    {name.replace('.', '_')}[{name.rpartition('.')[2]}]" for name in names or [room]]
        lines.append("  end")
    for room, names in parts.items():
        for other in cli.PACKAGES:
            if other != room and graph.direct_import_exists(importer=room, imported=other, as_packages=True):
                lines.append(f"  {room} --> {other}")
        arrows = ((one, two) for one in names for two in names if one != two)
        lines += [f"    {one.replace('.', '_')} --> {two.replace('.', '_')}" for one, two in arrows
                  if graph.direct_import_exists(importer=one, imported=two, as_packages=True)]  # fmt: skip
    return _between(ARCHITECTURE.read_text(encoding="utf-8"), GRAPH, GRAPH_END, [*lines, "```"])


def _parts(graph: grimp.ImportGraph, room: str) -> list[str]:
    """The packages of a room, not its single modules."""
    return sorted(name for name in graph.find_children(room) if graph.find_children(name))


def _section(name: str) -> str:
    return f"## minitron {name}\n\n```\n{cli.parser_of(name).format_help().rstrip()}\n```\n"


def acceptance_page() -> str:
    """docs/a100.md with the table of lines as the catalogue has it, and that of the hour."""
    rows = [
        f"| `{entry.name}` | {'GPU' if entry.gpu else 'any'} | {entry.question} | {entry.remedy} |"
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
    pages = {
        TARGET: document(),
        ACCEPTANCE: acceptance_page(),
        ARCHITECTURE: architecture_page(),
    }
    if "--check" in sys.argv[1:]:
        return int(any(not path.exists() or path.read_text(encoding="utf-8") != text for path, text in pages.items()))
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
