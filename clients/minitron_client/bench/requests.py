"""The requests of a schedule as bytes: prompts from their source, ids from their place, nothing left to chance.

The same profile and the same server give the same bytes, whichever slice or worker sends them.

Synthetic prompts have an exact number of served tokens, without guessing: what counts them is a tokenizer or the server
itself. A prompt is a row of common words, drawn with a seed. It grows or shrinks until the count is right; where one
word more is too many and one less too few, its last words are drawn again.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minitron import files
from minitron.errors import InputError, InvalidRequest, UsageError
from minitron.model import tokenizer_files
from minitron_client.bench.loops import Sendable
from minitron_client.bench.profile import Profile
from minitron_client.bench.schedule import ScheduledRequest
from minitron_client.bench.sender import serialize
from minitron_client.client.blocking import Client, HttpClient
from minitron_client.client.dialect import ServedModel
from minitron_client.client.request import Request

_COMMONEST = """
the and of to a in that it was his he with for as had you not be on at by her which have or from this but all she they
were my are me one their so an said them we who would been will no when there if more out up into do any what has man
could other than our some very time upon about may its only now little then can should made did us such great before
must two these see know over much down after first good men own never old way day where again
"""
_WORDS = _COMMONEST.split()
_TRIES = 200
_SAMPLE = "the old man and the sea"
#: Where the server itself must count, each length has so many different prompts and no more.
DISTINCT_COUNTED_BY_SERVER = 16


class SyntheticPrompts:
    """Makes prompts of given lengths. ``count`` tells how many tokens the server will see in a text."""

    def __init__(self, count: Callable[[str], int], seed: int = 0) -> None:
        self._count, self._seed = count, seed
        self._word_guess: dict[int, int] = {}

    def make(self, tokens: int, index: int = 0) -> str:
        """The ``index``-th prompt of ``tokens`` tokens; the same for the same seed. Raises InputError."""
        draw = random.Random(f"{self._seed}/{tokens}/{index}")
        words = draw.choices(_WORDS, k=self._word_guess.get(tokens, tokens))
        for _ in range(_TRIES):
            count = self._count(" ".join(words))
            if count == tokens:
                self._word_guess[tokens] = len(words)
                return " ".join(words)
            change = round((tokens - count) * len(words) / max(count, 1)) or (1 if count < tokens else -1)
            if change > 0:
                words += draw.choices(_WORDS, k=change)
            else:
                words = words[: max(len(words) + change, 0)] or draw.choices(_WORDS, k=1)
                words[-1] = draw.choice(_WORDS)
        raise InputError(f"no prompt of {tokens} tokens was found in {_TRIES} tries; ask for another length")


def tokenizer_count(folder: Path) -> Callable[[str], int]:
    """A counter by the tokenizer in ``folder``, special tokens included; raises InputError."""
    tokenizer, _ = tokenizer_files.opened(folder)
    return lambda text: len(tokenizer.encode(text).ids)


def found_tokenizer(folder: Path | None) -> Path | None:
    """The tokenizer folder of a checkpoint, engine or repository ``folder`` (or of a file in it), where it has one."""
    if folder is None:
        return None
    base = folder if folder.is_dir() else folder.parent
    return next((one for one in (base / "tokenizer", base) if (one / "tokenizer.json").is_file()), None)


def prompt_maker(
    client: Client | HttpClient, model: ServedModel, tokenizer: Path | None, seed: int
) -> tuple[SyntheticPrompts, str]:
    """A prompt maker for a model, and who counts for it in words: the ``tokenizer``'s folder, else the server.

    A tokenizer's count is compared with the server's once. Raises UsageError, InputError, ClientError.
    """
    if model.takes_ids:
        raise UsageError(f"prompts are text, and model {model.name!r} takes token ids; name another with --model")

    def server_count(text: str) -> int:
        count = client.generate(text, model=model.name, max_tokens=1).input_token_count
        if count is None:
            raise InvalidRequest(f"model {model.name!r} does not count prompt tokens; give its tokenizer (--tokenizer)")
        return count

    if tokenizer is None:
        return SyntheticPrompts(functools.cache(server_count), seed), "the server"
    count = tokenizer_count(tokenizer)
    served = client.generate(_SAMPLE, model=model.name, max_tokens=1).input_token_count
    if served is not None and served != count(_SAMPLE):
        raise UsageError(
            f"{tokenizer} counts {count(_SAMPLE)} tokens where the server counts {served}: it is another tokenizer; "
            "give the served one with --tokenizer, or none to let the server count"
        )
    return SyntheticPrompts(count, seed), f"the tokenizer in {tokenizer}"


def make_requests(
    scheduled: Sequence[ScheduledRequest], profile: Profile, model: ServedModel, prompts: SyntheticPrompts, *,
    few_prompts: bool = False, id_prefix: str | None = None,
) -> list[Sendable]:  # fmt: skip
    """Make every request of a schedule; ``few_prompts`` repeats some, where counting tokens is dear.

    Their ids are ``id_prefix`` (default: load-SEED-) and their place in the schedule.
    """
    texts = _texts(profile, prompts, few_prompts)
    prefix = f"load-{profile.seed}-" if id_prefix is None else id_prefix
    made = []
    for one in scheduled:
        text, max_tokens = texts(one)
        request = Request(
            text, max_tokens=max_tokens, min_tokens=max_tokens if profile.fixed_output else None,
            ignore_end=profile.fixed_output, temperature=profile.temperature,
            seed=None if not profile.temperature else profile.seed + one.index,
        )  # fmt: skip
        made.append((one.index, one.at_ns, serialize(model, request, f"{prefix}{one.index}")))
    return made


def _texts(
    profile: Profile, prompts: SyntheticPrompts, few_prompts: bool
) -> Callable[[ScheduledRequest], tuple[str, int]]:
    """Prompt and number of new tokens of a scheduled request."""
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
