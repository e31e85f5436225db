"""The parser of the command line and of its subcommands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from minitron import errors


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as every other error does.

    ``rest``: the name under which the words behind ``--`` are handed on unread, for another program; where it is None
    ``--`` has argparse's meaning.
    """

    rest: str | None = None

    def error(self, message: str) -> NoReturn:
        """Leave, with the exit code of a wrong argument."""
        line = " ".join(message.split())
        self.exit(errors.UsageError.exit_code, f"minitron: error: {line}; see '{self.prog} --help'\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, with what is behind ``--`` kept apart."""
        rest: list[str] = []
        if self.rest is not None and args is not None and "--" in args:
            at = args.index("--")
            args, rest = args[:at], list(args[at + 1 :])
        found: Any = super().parse_known_args(args, namespace)
        if self.rest is not None:
            setattr(found[0], self.rest, rest)
        return found  # type: ignore[no-any-return]


def complete_with(action: argparse.Action, names: Sequence[str]) -> None:
    """Let a shell complete ``names`` where they fit, and files (argcomplete looks for the attribute ``completer``)."""

    def completer(prefix: str, **_: Any) -> list[str]:
        from argcomplete.completers import FilesCompleter

        return [*(name for name in names if name.startswith(prefix)), *FilesCompleter()(prefix)]

    action.completer = completer  # type: ignore[attr-defined]
