"""The engines beside the one that is accepted: a small one that goes first, the CPU engine's reference, 16-bit weights,
the LLM API. Each is made, served and asked as that one is.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from minitron.artifacts import manifest
from minitron.checks import SKIPPED, Check, judge, of_step
from minitron.errors import InputError, MachineError
from minitron.recipe_model import Cpu, Recipe
from minitron_cli import main
from minitron_cli.accept import speed
from minitron_cli.accept.acceptance import TOKENS, Acceptance, write_recipe
from minitron_cli.accept.serving import Started
from minitron_client.client import Client, Request
from minitron_client.parity import stored


def small(work: Acceptance) -> Sequence[Check]:
    """A small model through every stage, in minutes: whatever does not work at all shows here."""
    if not work.on_gpu:
        return []
    if work.options.small is None:
        return [Check(entry.name, SKIPPED, "no small model is at hand; give --small") for entry in of_step("small")]
    folder, tokens = work.path("small"), work.evidence.folder / f"small-{TOKENS}"
    model = work.recipe.model.model_copy(update={"source": str(work.options.small), "revision": None})
    wanted = work.recipe.model_copy(update={"model": model.model_copy(update={"activations": None})})
    recipe_file = folder / "recipe.yaml"

    def do() -> Sequence[Check]:
        work.make("render", folder, write_recipe(wanted, recipe_file))
        built = manifest.read(folder / "engine", "engine").details
        with Started(work.evidence, folder / "repository", recipe_file, "small") as serving:
            work.tokens_of(serving, folder / "repository", tokens)
            loaded = serving.load_s
        shown = f"an engine after {built.get('build_seconds')} s"
        finite = stored.judge_finite("small.answers", tokens, f"served after {loaded:.1f} s")
        return [judge("small.built", [], shown), finite]

    return work.evidence.do("small", [wanted.model_dump(), work.options.container], do)


def llmapi(work: Acceptance) -> Sequence[Check]:
    """The PyTorch path, in a container under this user's id, which its image does not know."""
    if not work.on_gpu:
        return []
    if not work.options.llmapi:
        return [Check("llmapi.answers", SKIPPED, "--llmapi serves the model so too, for minutes of its own")]
    folder = work.path("llmapi")
    dtype = speed.sixteen_bit(work.recipe) if work.recipe.is_weight_only else work.recipe
    wanted = dtype.model_copy(update={"backend": "llmapi"})
    recipe_file = folder / "recipe.yaml"

    def do() -> Sequence[Check]:
        work.make("render", folder, write_recipe(wanted, recipe_file))
        with Started(work.evidence, folder / "repository", recipe_file, "llmapi") as serving:
            text = answer(serving)
        problems = [] if text.strip() else ["it answered with no text"]
        return [judge("llmapi.answers", problems, f"user id {os.getuid()}: {' '.join(text.split())[:80]}")]

    return work.evidence.do("llmapi", [dtype.model_dump(), wanted.model.source], do)


def answer(serving: Started) -> str:
    """A few tokens of text."""
    with Client(serving.endpoint()) as client:
        return client.generate(Request("In the beginning", max_tokens=8)).text


def reference(work: Acceptance) -> Sequence[Check]:
    """The CPU engine's outputs for the same checkpoint: given, or made here."""
    if not work.on_gpu:
        return [Check("words.reference", SKIPPED, "this run is itself the reference: evidence/greedy-tokens.json")]
    path = work.reference_tokens()
    if work.options.reference is not None:
        theirs, own = _checkpoint_of(path), work.digest_of("checkpoint")
        problems = [f"{path} is of checkpoint {theirs[:16]}, and this is {own[:16]}"] if theirs != own else []
        return [judge("words.reference", problems, f"{path}, of the same checkpoint")]
    if work.recipe.tensor_parallel * work.recipe.pipeline_parallel > 1:
        return [Check("words.reference", SKIPPED, "the CPU engine takes one rank; give --reference")]
    return work.evidence.do("reference", work.digest_of("checkpoint"), lambda: _ask_cpu(work, path), made=path)


def _ask_cpu(work: Acceptance, path: Path) -> Sequence[Check]:
    """The CPU engine of the same checkpoint, built, served and asked here."""
    folder = work.path("reference")
    recipe_file = folder / "recipe.yaml"
    try:
        work.make("render", folder, write_recipe(_for_reference(work.recipe), recipe_file), work.path("checkpoint"))
        with Started(work.evidence, folder / "repository", recipe_file, "reference") as serving:
            work.tokens_of(serving, folder / "repository", path)
    except Exception as error:
        said, code = main.explain(error)
        if code != MachineError.exit_code:
            raise
        return [Check("words.reference", SKIPPED, f"no CPU engine here ({said}); give --reference")]
    return [judge("words.reference", [], "made here by the CPU engine in exact mode")]


def _baseline_file(work: Acceptance) -> Path | None:
    made = work.measured("baseline")
    return work.options.baseline or (made if made.exists() else None)


def baseline(work: Acceptance) -> Sequence[Check]:
    """The 16-bit engine of the same model, measured at the same points, and ours beside it."""
    if not work.recipe.is_weight_only:
        return [Check(entry.name, SKIPPED, "this recipe is itself a 16-bit one") for entry in of_step("baseline")]
    ours = speed.read(work.measured("speed"))
    measured = _sixteen_bits(work)
    theirs = _baseline_file(work)
    return [*measured, speed.judge_beside(ours, speed.read(theirs) if theirs else None, on_gpu=work.on_gpu)]


def _sixteen_bits(work: Acceptance) -> Sequence[Check]:
    if work.options.baseline is not None:
        return [judge("baseline.measured", [], f"given: {work.options.baseline}")]
    folder = work.path("baseline")
    wanted = speed.sixteen_bit(work.recipe)
    recipe_file = folder / "recipe.yaml"

    def do() -> Sequence[Check]:
        work.make("render", folder, write_recipe(wanted, recipe_file))
        with Started(work.evidence, folder / "repository", recipe_file, "baseline") as serving:
            path = work.latency("baseline", serving, folder / "repository", work.points())
        return [judge("baseline.measured", [], speed.shown(speed.read(path)))]

    inputs = [wanted.model_dump(), work.points(), _source(work)]
    return work.evidence.do("baseline", inputs, do, made=work.measured("baseline"))


def _source(work: Acceptance) -> str | None:
    """The model that the checkpoint was made from."""
    with contextlib.suppress(InputError):
        return manifest.read(work.path("checkpoint"), "checkpoint").input.digest
    return None


def _for_reference(wanted: Recipe) -> Recipe:
    """The CPU engine that says what the checkpoint says: exact, one sequence at a time, limits otherwise the same."""
    one = {"workload": wanted.workload.model_copy(update={"concurrency": 1}),
           "limits": wanted.limits.model_copy(update={"max_batch_size": 1})}  # fmt: skip
    return wanted.model_copy(update={"target": "cpu", "cpu": Cpu(), **one})


def _checkpoint_of(tokens: Path) -> str:
    """Digest of the checkpoint that stored outputs are of; raises InputError."""
    try:
        return str(json.loads(tokens.read_text(encoding="utf-8"))["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{tokens} holds no tokens of 'minitron accept --target cpu' ({error})") from error
