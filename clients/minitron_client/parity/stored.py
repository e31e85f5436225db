"""Asking an engine for the greedy tokens of 20 prompts, and the file they are kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from minitron import files
from minitron.artifacts import manifest
from minitron.checks import Check, judge
from minitron.errors import InputError, InvalidRequest, UsageError
from minitron.model import tokenizer_files
from minitron_client.client.blocking import Client
from minitron_client.client.endpoint import Endpoint
from minitron_client.client.request import Request

SCHEMA = 1
ENGINE = "tensorrt_llm"
NEW_TOKENS = 64
#: English prose, code, numbers, other scripts, one word and a long sentence: what a base model is asked to continue.
PROMPTS = (
    "In the beginning God created the heaven and the earth.",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "import numpy as np\n\n# the mean of every column\n",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Q: What is 17 times 23?\nA:",
    "Once upon a time there was a",
    "The quick brown fox jumps over the lazy dog. The",
    "To make bread you need flour, water, salt and",
    "Water boils at one hundred degrees because",
    "And the king said unto them,",
    "Der schnelle braune Fuchs springt",
    "La révolution française a commencé en",
    "東京は日本の",
    '{"name": "Ada", "born": 1815, "known_for":',
    "SELECT name, price FROM products WHERE",
    "Dear Sir or Madam,\n\nI am writing to",
    "Yes",
    "The three laws of thermodynamics can be stated as follows. First,",
    "Although it had rained all night and the road to the village was deep in mud, the old man set out before dawn,"
    " carrying nothing but a lantern and the letter that",
)


@dataclass(frozen=True)
class Continuation:
    """One prompt and its greedy continuation; ``log_probs`` of the chosen tokens, natural logarithm."""

    prompt: str
    input_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True)
class GreedyOutputs:
    """What an engine said. ``checkpoint``: digest in the manifest of the checkpoint that it was made from."""

    checkpoint: str | None
    engine: str
    dtype: str
    continuations: tuple[Continuation, ...]

    def write(self, path: Path) -> None:
        """Store it as JSON."""
        document = {"kind": "tokens", "schema": SCHEMA, **asdict(self)}
        files.write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> GreedyOutputs:
        """Read what ``write`` stored; raises InputError."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("kind") != "tokens" or raw.pop("schema") != SCHEMA:
                raise ValueError("it is of another kind")
            continuations = tuple(
                Continuation(one["prompt"], tuple(one["input_ids"]), tuple(one["token_ids"]), tuple(one["log_probs"]))
                for one in raw.pop("continuations")
            )
            return cls(continuations=continuations, **raw)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read as tokens ({error}); 'minitron accept --only tokens' makes such a file"
            ) from error


def encode(tokenizer: Path, prompts: Sequence[str] = PROMPTS) -> list[list[int]]:
    """Token ids of the prompts by the ``tokenizer``'s folder, without special tokens; raises InputError."""
    reader, _ = tokenizer_files.opened(tokenizer)
    return [list(reader.encode(prompt, add_special_tokens=False).ids) for prompt in prompts]


def ask(client: Client, prompts: Sequence[str], ids: Sequence[list[int]], new_tokens: int) -> list[Continuation]:
    """What the engine's model continues each prompt with, greedily and without an end, one after the other.

    One at a time, so that what else runs cannot decide a near tie. Raises ClientError.
    """
    found = []
    for prompt, input_ids in zip(prompts, ids, strict=True):
        request = Request(input_ids=input_ids, max_tokens=new_tokens, return_log_probs=True)
        response = client.generate(request, model=ENGINE)
        output = response.outputs[0]
        if not len(output.token_ids) == len(output.log_probs) == new_tokens:
            raise InvalidRequest(
                f"{new_tokens} tokens of {prompt!r} were asked for; {len(output.token_ids)} came, "
                f"with {len(output.log_probs)} log probs"
            )
        found.append(Continuation(prompt, tuple(input_ids), output.token_ids, output.log_probs))
    return found


def judge_stored(endpoint: Endpoint, repository: Path, path: Path, new_tokens: int = NEW_TOKENS) -> Check:
    """``words.stored``: ask the server of ``repository``, and keep what it says at ``path``.

    Fewer than ``new_tokens`` are asked for where the engine's limits are lower. Raises ClientError, InputError,
    UsageError.
    """
    record = manifest.read(repository / "engine", "engine")
    version, limits = record.details.get("tensorrt_llm"), record.details["limits"]
    ids = encode(repository / "tokenizer")
    longest = min(limits["max_seq_len"] - max(map(len, ids)), new_tokens)
    if longest < 1 or max(map(len, ids)) > limits["max_input_len"]:
        raise UsageError(f"the engine's limits are below the longest prompt of {max(map(len, ids))} tokens")
    with Client(endpoint) as client:
        found = ask(client, PROMPTS, ids, longest)
    exact = version is None and record.details.get("execution") == "exact"
    outputs = GreedyOutputs(record.input.digest, f"TensorRT-LLM {version}" if version else "OpenVINO",
                            "float32" if exact else record.details["dtype"], tuple(found))  # fmt: skip
    outputs.write(path)
    return judge("words.stored", [], f"{len(found)} prompts x {longest} tokens by {outputs.engine} ({outputs.dtype})")


def judge_finite(name: str, path: Path, shown: str) -> Check:
    """Whether every log prob of stored outputs is a number, as check ``name``; raises InputError."""
    stored = GreedyOutputs.read(path).continuations
    bad = [one.prompt for one in stored if not all(map(math.isfinite, one.log_probs))]
    problems = (
        [f"{len(bad)} of {len(stored)} answers have log probs that are no numbers, first {bad[0]!r}"] if bad else []
    )
    return judge(name, problems, f"{shown}, every log prob finite")
