"""The steps of an acceptance in their order, composed of other commands: what each runs, and what it depends on.

Nothing here knows the inside of a room; steps speak through manifests and the documents that commands leave.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_trtllm import compat, files, gpus_here, manifest
from minitron_trtllm.acceptance import lines as acceptance
from minitron_trtllm.acceptance import speed
from minitron_trtllm.acceptance.evidence import Evidence, StepFailed, digest
from minitron_trtllm.acceptance.lines import FAIL, SKIPPED, Line, judge, of_step
from minitron_trtllm.acceptance.serving import Serving
from minitron_trtllm.errors import InputError, MachineError
from minitron_trtllm.output import human_bytes
from minitron_trtllm.recipe_model import Cpu, Recipe

log = logging.getLogger(__name__)

TOKENS, LATENCY = "greedy-tokens.json", "latency.json"


@dataclass(frozen=True)
class Options:
    """What the user chose beside the recipe. ``reference``, ``baseline``: files made elsewhere, or None.

    ``small``: the model that goes the whole way first, None for none. ``keep_going``: past a cheap proof that failed.
    """

    reference: Path | None = None
    baseline: Path | None = None
    grid: tuple[str, ...] = ()
    container: bool = True
    small: Path | None = None
    llmapi: bool = False
    keep_going: bool = False


@dataclass
class Way:
    """One acceptance in ``folder``; ``walk`` gives the lines step by step."""

    recipe: Recipe
    folder: Path
    evidence: Evidence
    options: Options
    _failed: set[str] = field(default_factory=set)

    @property
    def on_gpu(self) -> bool:
        """Whether a TensorRT engine is accepted."""
        return self.recipe.target != "cpu"

    @property
    def recipe_file(self) -> Path:
        """The recipe with every layer applied, as every step takes it."""
        return self.folder / "recipe.yaml"

    def _path(self, name: str) -> Path:
        return self.folder / name

    def walk(self) -> Iterator[tuple[str, list[Line]]]:
        """Do what is not done, in order; yields each step's name and lines."""
        steps: list[tuple[str, tuple[str, ...], Callable[[], list[Line]]]] = [
            ("tool", (), self._tool),
            ("small", (), self._small),
            ("machine", (), self._machine),
            ("convert", (), lambda: self._made("convert", "convert.done", "checkpoint")),
            ("checkpoint", ("convert",), self._checkpoint),
            ("build", ("convert", *self._if_gpu("machine")), lambda: self._made("build", "build.done", "engine")),
            ("engine", ("build",), self._engine),
            ("repository", ("build",), self._repository),
        ]
        for name, needs, work in steps:
            yield name, self._step(name, needs, work)
        with Serving(self.evidence, self._path("repository"), self.recipe_file, "serve") as serving:
            for name, needs, work in (
                ("serve", ("repository",), lambda: self._serve(serving)),
                ("audit", ("serve",), lambda: self._audit(serving)),
                ("tokens", ("serve",), lambda: self._tokens(serving)),
                ("bursts", ("serve",), lambda: self._bursts(serving)),
                ("speed", ("serve",), lambda: self._speed(serving)),
                ("behaviour", ("serve",), lambda: self._behaviour(serving)),
                ("stopped", ("serve",), lambda: self._stopped(serving)),
            ):
                yield name, self._step(name, needs, work)
        yield "baseline", self._step("baseline", ("speed", *self._if_gpu("machine")), self._baseline)
        yield "llmapi", self._step("llmapi", self._if_gpu("machine"), self._llmapi)
        yield "reference", self._step("reference", ("convert", *self._if_gpu("tokens")), self._reference)
        yield "words", self._step("words", ("tokens", "reference"), self._words)

    def _if_gpu(self, *steps: str) -> tuple[str, ...]:
        return steps if self.on_gpu else ()

    def _step(self, name: str, needs: Sequence[str], work: Callable[[], list[Line]]) -> list[Line]:
        """A step's lines in the catalogue's order, every one of them once."""
        lost = next((need for need in needs if need in self._failed), self._ended_early())
        if lost is not None:
            self._failed.add(name)
            return [Line(entry.id, SKIPPED, f"step {lost} failed") for entry in of_step(name)]
        log.info("step %s", name)
        try:
            lines = work()
        except StepFailed as failure:
            first, *others = of_step(name)
            lines = [Line(first.id, FAIL, failure.said),
                     *(Line(other.id, SKIPPED, f"{first.id} failed before") for other in others)]  # fmt: skip
        except (InputError, OSError) as error:
            lines = [Line(entry.id, FAIL, " ".join(str(error).split())) for entry in of_step(name)[:1]]
        if any(line.status == FAIL for line in lines) and name in (*_STAGES, *_PROOFS):
            self._failed.add(name)
        found = {line.id: line for line in lines}
        return [found.get(entry.id) or self._skipped(entry) for entry in of_step(name)]

    def _ended_early(self) -> str | None:
        """The cheap proof that failed, after which nothing dearer is worth its time; None with ``keep_going``."""
        return (
            None
            if self.options.keep_going or not self.on_gpu
            else next((step for step in _PROOFS if step in self._failed), None)
        )

    def _skipped(self, entry: acceptance.Entry) -> Line:
        lost = "step machine failed" if "machine" in self._failed else "the step gave no answer"
        return Line(entry.id, SKIPPED, lost if self.on_gpu else "only a GPU target can show it")

    # --- what is made -----------------------------------------------------------------------------------------------

    def _machine(self) -> list[Line]:
        facts = [vars(gpu) for gpu in gpus_here.gpus()], shutil.which("docker")

        def work() -> list[Line]:
            try:
                text = self.evidence.run("machine", "doctor", "--recipe", self.recipe_file, "--json")
            except StepFailed as failure:
                if failure.code != MachineError.exit_code or not failure.output:
                    raise
                text = failure.output
            checks = json.loads(text)["checks"]
            problems = [
                f"{one['subject']}: {one['message']} ({one['remedy']})" for one in checks if one["level"] == FAIL
            ]
            return [judge("machine.ready", problems, f"{len(checks)} checks, none failed")]

        return self.evidence.do("machine", [self.recipe.model_dump(), facts], work)

    def _made(self, stage: str, line: str, folder: str) -> list[Line]:
        self._make(stage, stage, self.folder, self.recipe_file)
        record = manifest.read(self._path(folder), folder)
        size = sum(file.size for file in record.files.values())
        shown = f"{len(record.files)} files, {size:,} bytes, digest {record.digest[:16]}"
        return [judge(line, [], shown + _beside_the_plan(record.details))]

    def _make(self, step: str, stage: str, folder: Path, recipe_file: Path) -> None:
        """``minitron make`` knows by itself what is up to date."""
        container = self._place() if self.on_gpu else []
        self.evidence.run(step, "make", stage, "--directory", folder, "--recipe", recipe_file, *container)

    def _repository(self) -> list[Line]:
        self._make("repository", "repo", self.folder, self.recipe_file)
        repository = self._path("repository")

        def check() -> list[Line]:
            self.evidence.run("repository", "repo", "check", repository)
            models = manifest.read(repository, "repository").details["models"]
            return [judge("repository.checked", [], f"models {', '.join(models)}")]

        return self.evidence.do("repository", self._digest("repository"), check)

    def _digest(self, stage: str) -> str:
        return manifest.read(self._path(stage), stage).digest

    # --- what is asked of TensorRT-LLM ------------------------------------------------------------------------------

    def _place(self) -> list[str]:
        return ["--container"] if self.options.container else []

    def _asked_of_tensorrt(self, step: str) -> list[str | Path]:
        """The words with which a probe asks TensorRT-LLM itself."""
        return [
            "--recipe",
            self.recipe_file,
            *self._place(),
            "--log",
            self.evidence.folder / f"{step}-tensorrt-llm.log",
        ]

    def _judged(self, step: str, *words: str | Path) -> list[Line]:
        """Lines of a command that judges."""
        path = self.evidence.folder / f"{step}.json"
        self.evidence.run(step, *words, "--output", path, verdict=True)
        return acceptance.read(path)[0]

    def _tool(self) -> list[Line]:
        if not self.on_gpu:
            return []
        image = compat.image(self.recipe.container.image_tag)
        words: list[str | Path] = ["probe", "tool", *self._asked_of_tensorrt("tool"), "--recipe", self.recipe_file]
        inputs = [vars(image), self.options.container, self.recipe.model_dump()]
        return self.evidence.do("tool", inputs, lambda: self._judged("tool", *words))

    def _small(self) -> list[Line]:
        """A small model through every stage, in minutes: whatever does not work at all shows here."""
        if not self.on_gpu:
            return []
        if self.options.small is None:
            return [Line(entry.id, SKIPPED, "no small model is at hand; give --small") for entry in of_step("small")]
        folder, tokens = self._path("small"), self.evidence.folder / f"small-{TOKENS}"
        model = self.recipe.model.model_copy(update={"source": str(self.options.small), "revision": None})
        wanted = self.recipe.model_copy(update={"model": model.model_copy(update={"activations": None})})
        recipe_file = write_recipe(wanted, folder / "recipe.yaml")

        def work() -> list[Line]:
            self._make("small", "repo", folder, recipe_file)
            built = manifest.read(folder / "engine", "engine").details
            with Serving(self.evidence, folder / "repository", recipe_file, "small") as serving:
                self.evidence.run("small", "tokens", "store", folder / "repository", "--tokens", tokens,
                                  "--url", serving.urls()["grpc"])  # fmt: skip
                loaded = serving.load_s
            shown = f"an engine after {built.get('build_seconds')} s"
            return [judge("small.built", [], shown), _finite("small.answers", tokens, f"served after {loaded:.1f} s")]

        return self.evidence.do("small", [wanted.model_dump(), self.options.container], work)

    def _checkpoint(self) -> list[Line]:
        checkpoint = self._path("checkpoint")
        words: list[str | Path] = ["probe", "checkpoint", checkpoint]
        ask = self.on_gpu and "machine" not in self._failed
        if ask:
            model = self.recipe.model
            revision = ["--revision", model.revision] if model.revision else []
            words += ["--model", model.source, *revision, *self._asked_of_tensorrt("checkpoint")]
        else:
            words.append("--files-only")
        inputs = [self._digest("checkpoint"), ask, self.recipe.container.image_tag]
        return self.evidence.do("checkpoint", inputs, lambda: self._judged("checkpoint", *words))

    def _engine(self) -> list[Line]:
        return self.evidence.do("engine", self._digest("engine"),
                                lambda: self._judged("engine", "probe", "engine", self._path("engine")))  # fmt: skip

    # --- what is asked of the server --------------------------------------------------------------------------------

    def _serve(self, serving: Serving) -> list[Line]:
        def start() -> list[Line]:
            serving.urls()
            models = manifest.read(self._path("repository"), "repository").details["models"]
            return [judge("serve.ready", [], f"{len(models)} models after {serving.load_s:.1f} s")]

        return self.evidence.do("serve", self._digest("repository"), start)

    def _audit(self, serving: Serving) -> list[Line]:
        def work() -> list[Line]:
            serving.urls()
            return self._judged("audit", "audit", self._path("repository"), "--state", serving.state)

        return self.evidence.do("audit", self._digest("repository"), work)

    def _tokens(self, serving: Serving) -> list[Line]:
        path = self.evidence.folder / TOKENS

        def work() -> list[Line]:
            stored = self._judged("tokens", "tokens", "store", self._path("repository"), "--tokens", path,
                                  "--url", serving.urls()["grpc"])  # fmt: skip
            return [*stored, _finite("words.finite", path, "20 prompts")]

        return self.evidence.do("tokens", self._digest("repository"), work, made=path)

    def _behaviour(self, serving: Serving) -> list[Line]:
        def work() -> list[Line]:
            urls = serving.urls()
            return self._judged("behaviour", "conformance", self._path("repository"), "--url", urls["grpc"],
                                "--http-url", urls["http"], "--metrics-url", urls["metrics"])  # fmt: skip

        return self.evidence.do("behaviour", self._digest("repository"), work)

    def _stopped(self, serving: Serving) -> list[Line]:
        return self.evidence.do(
            "stopped", self._digest("repository"), lambda: [judge("serve.stopped", [], serving.end())]
        )

    def _llmapi(self) -> list[Line]:
        """The PyTorch path, in a container under this user's id, which its image does not know."""
        if not self.on_gpu:
            return []
        if not self.options.llmapi:
            return [Line("llmapi.answers", SKIPPED, "--llmapi serves the model so too, for minutes of its own")]
        folder, model = self._path("llmapi"), self.recipe.model
        dtype = speed.sixteen_bit(self.recipe) if speed.is_weight_only(self.recipe) else self.recipe
        recipe_file = write_recipe(dtype.model_copy(update={"backend": "llmapi"}), folder / "recipe.yaml")
        repository = folder / "repository"

        def work() -> list[Line]:
            revision = ["--revision", model.revision] if model.revision else []
            self.evidence.run("llmapi", "repo", "render", model.source, *revision, "--backend", "llmapi", "--recipe",
                              recipe_file, "--output", repository, *_force(repository))  # fmt: skip
            with Serving(self.evidence, repository, recipe_file, "llmapi") as serving:
                text = self.evidence.run("llmapi", "generate", "In the beginning", "--max-tokens", "8", "--url",
                                         serving.urls()["grpc"])  # fmt: skip
            problems = [] if text.strip() else ["it answered with no text"]
            return [judge("llmapi.answers", problems, f"user id {os.getuid()}: {' '.join(text.split())[:80]}")]

        return self.evidence.do("llmapi", [dtype.model_dump(), model.source], work)

    # --- the same words ---------------------------------------------------------------------------------------------

    def _reference_tokens(self) -> Path:
        given = self.options.reference
        if given is None:
            return self.evidence.folder / f"reference-{TOKENS}"
        inside = given / "evidence" / TOKENS
        return inside if inside.exists() else given / TOKENS if given.is_dir() else given

    def _reference(self) -> list[Line]:
        if not self.on_gpu:
            return [Line("words.reference", SKIPPED, "this run is itself the reference: evidence/greedy-tokens.json")]
        path = self._reference_tokens()
        if self.options.reference is not None:
            theirs, own = _checkpoint_of(path), self._digest("checkpoint")
            problems = [f"{path} is of checkpoint {theirs[:16]}, and this is {own[:16]}"] if theirs != own else []
            return [judge("words.reference", problems, f"{path}, of the same checkpoint")]
        if self.recipe.tensor_parallel * self.recipe.pipeline_parallel > 1:
            return [Line("words.reference", SKIPPED, "the CPU engine takes one rank; give --reference")]
        return self.evidence.do("reference", self._digest("checkpoint"), lambda: self._ask_cpu(path), made=path)

    def _ask_cpu(self, path: Path) -> list[Line]:
        """The CPU engine of the same checkpoint, built, served and asked here."""
        folder = self._path("reference")
        recipe_file = write_recipe(_for_reference(self.recipe), folder / "recipe.yaml")
        engine, repository = folder / "engine", folder / "repository"
        try:
            made = [("build", self._path("checkpoint"), engine), ("repo render", engine, repository)]
            for words, source, output in made:
                self.evidence.run("reference", *words.split(), source, "--recipe", recipe_file, "--output", output,
                                  *_force(output))  # fmt: skip
            with Serving(self.evidence, repository, recipe_file, "reference") as serving:
                self.evidence.run("reference", "tokens", "store", repository, "--tokens", path,
                                  "--url", serving.urls()["grpc"])  # fmt: skip
        except StepFailed as failure:
            if failure.code != MachineError.exit_code:
                raise
            return [Line("words.reference", SKIPPED, f"no CPU engine here ({failure.said}); give --reference")]
        return [judge("words.reference", [], "made here by the CPU engine in exact mode")]

    def _words(self) -> list[Line]:
        if not self.on_gpu:
            return [Line("words.same", SKIPPED, "only a GPU target can show it")]
        found, reference = self.evidence.folder / TOKENS, self._reference_tokens()
        if not reference.exists():
            return [Line("words.same", SKIPPED, "there is no reference")]
        return self.evidence.do("words", [digest(found), digest(reference)],
                                lambda: self._judged("words", "tokens", "compare", found, reference))  # fmt: skip

    # --- speed ------------------------------------------------------------------------------------------------------

    def _latency(self, step: str, serving: Serving, repository: Path, points: Sequence[str]) -> Path:
        path = self._measured(step)
        self.evidence.run(step, "latency", "--grid", *points, "--url", serving.urls()["grpc"],
                          "--manifest", repository, "--output", path)  # fmt: skip
        return path

    def _bursts(self, serving: Serving) -> list[Line]:
        points = speed.bursts(self.options.grid)

        def work() -> list[Line]:
            path = self._latency("bursts", serving, self._path("repository"), points)
            return [judge("bursts.answered", [], speed.shown(speed.read(path)))]

        return self.evidence.do("bursts", [self._digest("repository"), points], work)

    def _points(self) -> list[str]:
        """The points of the grid, and the one that shows what a long prompt's first token takes."""
        return list(dict.fromkeys([*self.options.grid, speed.prefill_point(self.recipe)]))

    def _measured(self, step: str) -> Path:
        return self.evidence.folder / (LATENCY if step == "speed" else f"{step}-{LATENCY}")

    def _baseline_file(self) -> Path | None:
        made = self._measured("baseline")
        return self.options.baseline or (made if made.exists() else None)

    def _baseline(self) -> list[Line]:
        """The 16-bit engine of the same model, measured at the same points, and ours beside it."""
        if not speed.is_weight_only(self.recipe):
            return [Line(entry.id, SKIPPED, "this recipe is itself a 16-bit one") for entry in of_step("baseline")]
        ours = speed.read(self._measured("speed"))
        measured = self._sixteen_bits()
        theirs = self._baseline_file()
        return [*measured, speed.judge_beside(ours, speed.read(theirs) if theirs else None, on_gpu=self.on_gpu)]

    def _sixteen_bits(self) -> list[Line]:
        if self.options.baseline is not None:
            return [judge("baseline.measured", [], f"given: {self.options.baseline}")]
        folder = self._path("baseline")
        wanted = speed.sixteen_bit(self.recipe)
        recipe_file = write_recipe(wanted, folder / "recipe.yaml")

        def work() -> list[Line]:
            self._make("baseline", "repo", folder, recipe_file)
            with Serving(self.evidence, folder / "repository", recipe_file, "baseline") as serving:
                path = self._latency("baseline", serving, folder / "repository", self._points())
            return [judge("baseline.measured", [], speed.shown(speed.read(path)))]

        inputs = [wanted.model_dump(), self._points(), self._source()]
        return self.evidence.do("baseline", inputs, work, made=self._measured("baseline"))

    def _source(self) -> str | None:
        """The model that the checkpoint was made from."""
        with contextlib.suppress(InputError):
            return manifest.read(self._path("checkpoint"), "checkpoint").input.digest
        return None

    def _speed(self, serving: Serving) -> list[Line]:
        def work() -> list[Line]:
            return speed.judge_speed(
                speed.read(self._latency("speed", serving, self._path("repository"), self._points()))
            )

        return self.evidence.do(
            "speed", [self._digest("repository"), self._points()], work, made=self._measured("speed")
        )


#: Steps without which the ones after them have nothing to look at; others may fail alone.
_STAGES = ("machine", "convert", "build", "repository", "serve", "tokens", "speed", "reference")
#: Steps that cost minutes and tell that the hour would be lost: where one fails on a GPU, it ends there.
_PROOFS = ("tool", "small", "machine", "convert", "checkpoint")


def write_recipe(wanted: Recipe, path: Path) -> Path:
    """Write a recipe as a YAML file (JSON is YAML); returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(wanted.model_dump(), indent=1) + "\n")
    return path


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


def _finite(name: str, tokens: Path, shown: str) -> Line:
    """Whether every log prob of stored tokens is a number; raises InputError."""
    try:
        stored = json.loads(tokens.read_text(encoding="utf-8"))["continuations"]
        bad = [one["prompt"] for one in stored if not all(map(math.isfinite, one["log_probs"]))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{tokens} cannot be read as stored tokens ({error!r})") from error
    problems = (
        [f"{len(bad)} of {len(stored)} answers have log probs that are no numbers, first {bad[0]!r}"] if bad else []
    )
    return judge(name, problems, f"{shown}, every log prob finite")


def _beside_the_plan(details: Mapping[str, Any]) -> str:
    """What a build on a GPU took, beside what was planned; nothing where the manifest does not say."""
    if "build_seconds" not in details:
        return ""
    peak, planned = details.get("build_peak_bytes"), details["plan"]["memory"]["weight_bytes"]
    memory = f"{human_bytes(peak)} of memory at the peak" if peak else "its peak memory not known"
    return f"; {details['build_seconds']} s and {memory}, weights by the plan {human_bytes(planned)}"


def _force(folder: Path) -> list[str]:
    return ["--force"] if folder.exists() else []
