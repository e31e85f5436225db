"""Every number of an acceptance in one flat table, and two acceptances side by side.

Names carry their unit. A number that was not measured is absent, never 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from minitron import console
from minitron.artifacts import manifest
from minitron.errors import InputError

Numbers = dict[str, float]


def collect(folder: Path, seconds: Mapping[str, float | None]) -> Numbers:
    """What the steps left: their times, the build beside its plan, the runtime, every latency point."""
    found: Numbers = {f"step.{step}_s": taken for step, taken in seconds.items() if taken is not None}
    with suppress(InputError):
        details = manifest.read(folder / "engine", "engine").details
        for name in ("build_seconds", "build_peak_bytes"):
            if details.get(name) is not None:
                found[f"build.{name.removeprefix('build_')}"] = details[name]
        planned = (details.get("plan") or {}).get("memory") or {}
        found |= {f"plan.{name}": value for name, value in planned.items() if value is not None}
    found |= {f"runtime.{name}": value for name, value in _document(folder, "audit").get("numbers", {}).items()}
    for run in ("bursts", "speed", "baseline"):
        document = _document(folder, "latency" if run == "speed" else f"{run}-latency")
        found |= {f"{run}.{name}": value for point in document.get("points", ()) for name, value in _point(point)}
    return found


def _document(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        loaded: Mapping[str, Any] = json.loads((folder / "evidence" / f"{name}.json").read_text(encoding="utf-8"))
        return loaded
    except (OSError, ValueError):
        return {}


def _point(point: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    name = "{input_tokens}:{output_tokens}:{concurrency}".format(**point["point"])
    if point["tokens_per_s"]:
        yield f"{name}.tokens_per_s", point["tokens_per_s"]["value"]
    for metric, percentiles in point["metrics"].items():
        for which in ("p50", "p99"):
            if percentiles.get(which):
                yield f"{name}.{metric}_{which}", percentiles[which]["value"]


def read(path: Path) -> Mapping[str, Any]:
    """A stored acceptance; raises InputError."""
    try:
        loaded: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if loaded["kind"] != "acceptance" or not isinstance(loaded["numbers"], dict):
            raise ValueError("it is of another kind")
        return loaded
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no acceptance.json with numbers ({error!r})") from error


def side_by_side(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Lines with another verdict, and every number of either with the ratio of ours to theirs where both have it."""
    verdicts = [{line["id"]: line["status"] for line in one["lines"]} for one in (ours, theirs)]
    lines = [
        {"id": name, "ours": verdicts[0].get(name), "theirs": verdicts[1].get(name)}
        for name in dict.fromkeys([*verdicts[0], *verdicts[1]])
        if verdicts[0].get(name) != verdicts[1].get(name)
    ]
    both = ours["numbers"], theirs["numbers"]
    numbers = [
        {
            "name": name,
            "ours": both[0].get(name),
            "theirs": both[1].get(name),
            "ratio": _ratio(*(one.get(name) for one in both)),
        }
        for name in dict.fromkeys([*both[0], *both[1]])
    ]
    about = [
        {key: one.get(key) for key in ("recipe", "model", "precision", "target", "created")} for one in (ours, theirs)
    ]
    return {
        "kind": "acceptances side by side",
        "ours": about[0],
        "theirs": about[1],
        "lines": lines,
        "numbers": numbers,
    }


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return round(ours / theirs, 4) if ours is not None and theirs else None


def text(compared: Mapping[str, Any]) -> str:
    """For people."""
    head = [
        f"{side}: {', '.join(str(value) for value in compared[side].values() if value)}" for side in ("ours", "theirs")
    ]
    rows = [
        (
            one["name"],
            _shown(one["ours"]),
            _shown(one["theirs"]),
            "-" if one["ratio"] is None else f"{one['ratio']:.3f}",
        )
        for one in compared["numbers"]
    ]
    tables = [console.table(rows, ("number", "ours", "theirs", "ours by theirs"))]
    if compared["lines"]:
        differing = [(one["id"], one["ours"] or "-", one["theirs"] or "-") for one in compared["lines"]]
        tables.append(console.table(differing, ("line", "ours", "theirs")))
    else:
        tables.append("Every line has the same verdict in both.")
    return "\n\n".join(["\n".join(head), *tables])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.6g}"
