"""A finished run as reports see it: its result, and its records on a common clock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron.errors import InputError
from minitron_client.bench.profile import Slo
from minitron_client.bench.record import Record, read_records
from minitron_client.bench.run import RESULT, SCHEMA
from minitron_client.bench.summary import Summary, Window, summarize


@dataclass(frozen=True)
class Run:
    """A run (or all slices of one): ``document`` of the whole, ``parts`` the documents it was put together from."""

    name: str
    folder: Path
    document: dict[str, Any]
    parts: list[dict[str, Any]]

    @property
    def kind(self) -> str:
        """``load`` or ``capacity``."""
        return str(self.document["kind"])

    @cached_property
    def records(self) -> list[Record]:
        """All records, their times in ns after the start of their slice, by intended send."""
        found = [record for part in self.parts for record in _records(self.folder, part)]
        return sorted(found, key=lambda record: record.intended_ns)

    @property
    def window(self) -> Window:
        """The steady window in ns after the start."""
        return _window(self.parts[0])


def read(folder: Path) -> Run:
    """Read a run's folder, putting its slices together; raises InputError."""
    paths = sorted(folder.glob("run-*-of-*.json")) or [folder / RESULT]
    parts = [_document(path) for path in paths]
    if parts[0]["kind"] == "capacity" or parts[0]["slice"]["of"] == 1:
        return Run(folder.name, folder, parts[0], parts)
    _check_slices(folder, parts)
    return Run(folder.name, folder, _together(folder, parts), parts)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is not there; a run's folder is made by 'minitron bench --profile'") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    kinds = ("load", "capacity")
    if not isinstance(document, dict) or document.get("kind") not in kinds or document.get("schema") != SCHEMA:
        raise InputError(f"{path} is no result of a load test of this version")
    return document


def _check_slices(folder: Path, parts: list[dict[str, Any]]) -> None:
    of = parts[0]["slice"]["of"]
    numbers = sorted(part["slice"]["number"] for part in parts)
    if any(part["slice"]["of"] != of or part["profile"] != parts[0]["profile"] for part in parts):
        raise InputError(f"{folder} holds slices of different load tests")
    if numbers != list(range(1, of + 1)):
        raise InputError(f"{folder} holds slices {numbers} of {of}; put the records and results of all into one folder")


def _together(folder: Path, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of all slices, from their records, each on the clock of its own start."""
    window, slo, total = _window(parts[0]), Slo(**parts[0]["profile"]["slo"]), Summary()
    for part in parts:
        total.merge(summarize(_records(folder, part), window, slo))
    return parts[0] | {
        "slice": {"number": 1, "of": 1}, "summary": total.document(window),
        "stalls": [stall for part in parts for stall in part["stalls"]],
        "stopped": next((part["stopped"] for part in parts if part["stopped"]), None),
        "server_gone": next((found for part in parts if (found := part.get("server_gone"))), None),
        "workers": [worker for part in parts for worker in part["workers"]], "server": parts[0]["server"],
    }  # fmt: skip


def _window(part: dict[str, Any]) -> Window:
    return Window(part["window"]["start_ns"] - part["start_ns"], part["window"]["end_ns"] - part["start_ns"])


def _records(folder: Path, part: dict[str, Any]) -> Iterator[Record]:
    start = part["start_ns"]
    for name in part["records"]:
        for record in read_records(folder / name):
            record.intended_ns -= start
            record.sent_ns -= start
            record.ended_ns -= start
            record.responses = [(time_ns - start, count) for time_ns, count in record.responses]
            yield record
