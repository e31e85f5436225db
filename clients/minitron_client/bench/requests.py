"""The requests of a plan as bytes: prompts from their source, ids from their place in the plan, nothing left to chance.

The same profile and the same server give the same bytes, whichever slice or worker sends them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minitron import files
from minitron.errors import InputError
from minitron_client.bench.profile import Profile
from minitron_client.bench.prompts import PromptMaker
from minitron_client.bench.schedule import Planned
from minitron_client.bench.wire import Prepared, prepare
from minitron_client.client.dialect import ServedModel
from minitron_client.client.request import Request

# (index, ns after the start or None, bytes, max_tokens): what a worker is given.
Sendable = tuple[int, "int | None", Prepared]
# Where the server itself must count, each length has so many different prompts and no more.
DISTINCT_COUNTED_BY_SERVER = 16


def build(
    planned: Sequence[Planned], profile: Profile, model: ServedModel, prompts: PromptMaker, *, few_prompts: bool = False
) -> list[Sendable]:
    """Make every request of ``planned``; ``few_prompts`` repeats some, where counting tokens is dear."""
    texts = _texts(profile, prompts, few_prompts)
    made = []
    for one in planned:
        text, max_tokens = texts(one)
        request = Request(
            text, max_tokens=max_tokens, min_tokens=max_tokens if profile.fixed_output else None,
            ignore_end=profile.fixed_output, temperature=profile.temperature,
            seed=None if not profile.temperature else profile.seed + one.index,
        )  # fmt: skip
        made.append((one.index, one.at_ns, prepare(model, request, f"load-{profile.seed}-{one.index}")))
    return made


def _texts(profile: Profile, prompts: PromptMaker, few_prompts: bool) -> Callable[[Planned], tuple[str, int]]:
    """Prompt and number of new tokens of a planned request."""
    source = profile.prompts
    if source.kind == "synthetic":
        distinct = DISTINCT_COUNTED_BY_SERVER if few_prompts else 1 << 62
        return lambda one: (prompts.make(one.input_tokens, one.index % distinct), one.output_tokens)
    assert source.path is not None
    read = (_prompt_file if source.kind == "file" else _sharegpt)(source.path)
    return lambda one: (read[one.index % len(read)][0], read[one.index % len(read)][1] or one.output_tokens)


def _prompt_file(path: Path) -> list[tuple[str, int | None]]:
    rows = [json_value(line, path) for line in files.read_text(path).split("\n") if line.strip()]
    try:
        found = [
            (str(row["prompt"]), None if row.get("max_tokens") is None else int(row["max_tokens"])) for row in rows
        ]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: every line needs a JSON object with a prompt ({error})") from error
    return _some(found, path)


def _sharegpt(path: Path) -> list[tuple[str, int | None]]:
    """The first human turn of each conversation."""
    found: list[tuple[str, int | None]] = []
    try:
        for one in json_value(files.read_text(path), path):
            turns = [turn["value"] for turn in one["conversations"] if turn["from"] in ("human", "user")]
            found += [(turns[0], None)] if turns and turns[0] else []
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: no list of objects with conversations of from and value ({error})") from error
    return _some(found, path)


def json_value(text: str, path: Path) -> Any:
    """Read JSON out of ``path``; raises InputError."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error


def _some(found: list[tuple[str, int | None]], path: Path) -> list[tuple[str, int | None]]:
    if not found:
        raise InputError(f"{path} holds no prompt")
    return found
