"""The engines beside the one that is accepted: a small one that goes first, the CPU engine's reference, 16-bit weights,
the LLM API. Each is made, served and asked by the same commands.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from minitron.acceptance import SKIPPED, Line, judge, of_step
from minitron.artifacts import manifest
from minitron.errors import InputError, MachineError
from minitron.recipe_model import Cpu, Recipe
from minitron_cli.accept import speed
from minitron_cli.accept.evidence import StepFailed
from minitron_cli.accept.serving import Serving
from minitron_cli.accept.work import TOKENS, Work, finite, force, write_recipe


def small(work: Work) -> list[Line]:
    """A small model through every stage, in minutes: whatever does not work at all shows here."""
    if not work.on_gpu:
        return []
    if work.options.small is None:
        return [Line(entry.id, SKIPPED, "no small model is at hand; give --small") for entry in of_step("small")]
    folder, tokens = work.path("small"), work.evidence.folder / f"small-{TOKENS}"
    model = work.recipe.model.model_copy(update={"source": str(work.options.small), "revision": None})
    wanted = work.recipe.model_copy(update={"model": model.model_copy(update={"activations": None})})
    recipe_file = write_recipe(wanted, folder / "recipe.yaml")

    def do() -> list[Line]:
        work.make("small", "repo", folder, recipe_file)
        built = manifest.read(folder / "engine", "engine").details
        with Serving(work.evidence, folder / "repository", recipe_file, "small") as serving:
            work.evidence.run("small", "tokens", "store", folder / "repository", "--tokens", tokens,
                              "--url", serving.urls()["grpc"])  # fmt: skip
            loaded = serving.load_s
        shown = f"an engine after {built.get('build_seconds')} s"
        return [judge("small.built", [], shown), finite("small.answers", tokens, f"served after {loaded:.1f} s")]

    return work.evidence.do("small", [wanted.model_dump(), work.options.container], do)


def llmapi(work: Work) -> list[Line]:
    """The PyTorch path, in a container under this user's id, which its image does not know."""
    if not work.on_gpu:
        return []
    if not work.options.llmapi:
        return [Line("llmapi.answers", SKIPPED, "--llmapi serves the model so too, for minutes of its own")]
    folder, model = work.path("llmapi"), work.recipe.model
    dtype = speed.sixteen_bit(work.recipe) if speed.is_weight_only(work.recipe) else work.recipe
    recipe_file = write_recipe(dtype.model_copy(update={"backend": "llmapi"}), folder / "recipe.yaml")
    repository = folder / "repository"

    def do() -> list[Line]:
        revision = ["--revision", model.revision] if model.revision else []
        work.evidence.run("llmapi", "render", model.source, *revision, "--backend", "llmapi", "--recipe",
                          recipe_file, "--output", repository, *force(repository))  # fmt: skip
        with Serving(work.evidence, repository, recipe_file, "llmapi") as serving:
            text = work.evidence.run("llmapi", "generate", "In the beginning", "--max-tokens", "8", "--url",
                                     serving.urls()["grpc"])  # fmt: skip
        problems = [] if text.strip() else ["it answered with no text"]
        return [judge("llmapi.answers", problems, f"user id {os.getuid()}: {' '.join(text.split())[:80]}")]

    return work.evidence.do("llmapi", [dtype.model_dump(), model.source], do)


def reference_tokens(work: Work) -> Path:
    """Where the tokens are, or will be, that ours are compared with."""
    given = work.options.reference
    if given is None:
        return work.evidence.folder / f"reference-{TOKENS}"
    inside = given / "evidence" / TOKENS
    return inside if inside.exists() else given / TOKENS if given.is_dir() else given


def reference(work: Work) -> list[Line]:
    """The CPU engine's tokens for the same checkpoint: given, or made here."""
    if not work.on_gpu:
        return [Line("words.reference", SKIPPED, "this run is itself the reference: evidence/greedy-tokens.json")]
    path = reference_tokens(work)
    if work.options.reference is not None:
        theirs, own = _checkpoint_of(path), work.digest_of("checkpoint")
        problems = [f"{path} is of checkpoint {theirs[:16]}, and this is {own[:16]}"] if theirs != own else []
        return [judge("words.reference", problems, f"{path}, of the same checkpoint")]
    if work.recipe.tensor_parallel * work.recipe.pipeline_parallel > 1:
        return [Line("words.reference", SKIPPED, "the CPU engine takes one rank; give --reference")]
    return work.evidence.do("reference", work.digest_of("checkpoint"), lambda: _ask_cpu(work, path), made=path)


def _ask_cpu(work: Work, path: Path) -> list[Line]:
    """The CPU engine of the same checkpoint, built, served and asked here."""
    folder = work.path("reference")
    recipe_file = write_recipe(_for_reference(work.recipe), folder / "recipe.yaml")
    engine, repository = folder / "engine", folder / "repository"
    try:
        made = [("build", work.path("checkpoint"), engine), ("render", engine, repository)]
        for words, source, output in made:
            work.evidence.run("reference", *words.split(), source, "--recipe", recipe_file, "--output", output,
                              *force(output))  # fmt: skip
        with Serving(work.evidence, repository, recipe_file, "reference") as serving:
            work.evidence.run("reference", "tokens", "store", repository, "--tokens", path,
                              "--url", serving.urls()["grpc"])  # fmt: skip
    except StepFailed as failure:
        if failure.code != MachineError.exit_code:
            raise
        return [Line("words.reference", SKIPPED, f"no CPU engine here ({failure.said}); give --reference")]
    return [judge("words.reference", [], "made here by the CPU engine in exact mode")]


def _baseline_file(work: Work) -> Path | None:
    made = work.measured("baseline")
    return work.options.baseline or (made if made.exists() else None)


def baseline(work: Work) -> list[Line]:
    """The 16-bit engine of the same model, measured at the same points, and ours beside it."""
    if not speed.is_weight_only(work.recipe):
        return [Line(entry.id, SKIPPED, "this recipe is itself a 16-bit one") for entry in of_step("baseline")]
    ours = speed.read(work.measured("speed"))
    measured = _sixteen_bits(work)
    theirs = _baseline_file(work)
    return [*measured, speed.judge_beside(ours, speed.read(theirs) if theirs else None, on_gpu=work.on_gpu)]


def _sixteen_bits(work: Work) -> list[Line]:
    if work.options.baseline is not None:
        return [judge("baseline.measured", [], f"given: {work.options.baseline}")]
    folder = work.path("baseline")
    wanted = speed.sixteen_bit(work.recipe)
    recipe_file = write_recipe(wanted, folder / "recipe.yaml")

    def do() -> list[Line]:
        work.make("baseline", "repo", folder, recipe_file)
        with Serving(work.evidence, folder / "repository", recipe_file, "baseline") as serving:
            path = work.latency("baseline", serving, folder / "repository", work.points())
        return [judge("baseline.measured", [], speed.shown(speed.read(path)))]

    inputs = [wanted.model_dump(), work.points(), _source(work)]
    return work.evidence.do("baseline", inputs, do, made=work.measured("baseline"))


def _source(work: Work) -> str | None:
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
    """Digest of the checkpoint that stored tokens are of; raises InputError."""
    try:
        return str(json.loads(tokens.read_text(encoding="utf-8"))["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{tokens} holds no tokens of 'minitron accept --target cpu' ({error})") from error
