"""The steps of an acceptance in their order, composed of other commands: what each runs, and what it depends on.

Nothing here knows the inside of a room; steps speak through manifests and the documents that commands leave.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minitron_trtllm import compat, files, gpus_here, manifest
from minitron_trtllm.acceptance import lines as acceptance
from minitron_trtllm.acceptance import speed
from minitron_trtllm.acceptance.evidence import Evidence, StepFailed, digest
from minitron_trtllm.acceptance.lines import FAIL, SKIPPED, Line, judge, of_step
from minitron_trtllm.acceptance.serving import Serving
from minitron_trtllm.errors import InputError, MachineError
from minitron_trtllm.recipe_model import Cpu, Recipe

log = logging.getLogger(__name__)

TOKENS, LATENCY = "greedy-tokens.json", "latency.json"


@dataclass(frozen=True)
class Options:
    """What the user chose beside the recipe. ``reference``, ``baseline``: files made elsewhere, or None."""

    reference: Path | None = None
    baseline: Path | None = None
    grid: tuple[str, ...] = ()
    container: bool = True


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
            ("machine", (), self._machine),
            ("tool", ("machine",), self._tool),
            ("convert", (), lambda: self._made("convert", "convert.done", "checkpoint")),
            ("checkpoint", ("convert",), self._checkpoint),
            ("build", ("convert", *self._if_gpu("machine")), lambda: self._made("build", "build.done", "engine")),
            ("engine", ("build",), self._engine),
            ("repository", ("build",), self._repository),
            ("baseline", self._if_gpu("machine"), self._baseline),
        ]
        for name, needs, work in steps:
            yield name, self._step(name, needs, work)
        with Serving(self.evidence, self._path("repository"), self.recipe_file, "serve") as serving:
            for name, needs, work in (
                ("serve", ("repository",), lambda: self._serve(serving)),
                ("audit", ("serve",), lambda: self._audit(serving)),
                ("tokens", ("serve",), lambda: self._tokens(serving)),
                ("behaviour", ("serve",), lambda: self._behaviour(serving)),
                ("speed", ("serve",), lambda: self._speed(serving)),
            ):
                yield name, self._step(name, needs, work)
        yield "reference", self._step("reference", ("convert", *self._if_gpu("tokens")), self._reference)
        yield "words", self._step("words", ("tokens", "reference"), self._words)

    def _if_gpu(self, *steps: str) -> tuple[str, ...]:
        return steps if self.on_gpu else ()

    def _step(self, name: str, needs: Sequence[str], work: Callable[[], list[Line]]) -> list[Line]:
        """A step's lines in the catalogue's order, every one of them once."""
        lost = next((need for need in needs if need in self._failed), None)
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
        if any(line.status == FAIL for line in lines) and name in _STAGES:
            self._failed.add(name)
        found = {line.id: line for line in lines}
        return [found.get(entry.id) or self._skipped(entry) for entry in of_step(name)]

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
        return [judge(line, [], f"{len(record.files)} files, {size:,} bytes, digest {record.digest[:16]}")]

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
        words: list[str | Path] = ["probe", "tool", *self._asked_of_tensorrt("tool")]
        return self.evidence.do("tool", [vars(image), self.options.container], lambda: self._judged("tool", *words))

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
            return self._judged("tokens", "tokens", "store", self._path("repository"), "--tokens", path,
                                "--url", serving.urls()["grpc"])  # fmt: skip

        return self.evidence.do("tokens", self._digest("repository"), work, made=path)

    def _behaviour(self, serving: Serving) -> list[Line]:
        def work() -> list[Line]:
            urls = serving.urls()
            return self._judged("behaviour", "conformance", self._path("repository"), "--url", urls["grpc"],
                                "--http-url", urls["http"], "--metrics-url", urls["metrics"])  # fmt: skip

        return self.evidence.do("behaviour", self._digest("repository"), work)

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

    def _latency(self, step: str, serving: Serving, repository: Path, *more: str | Path) -> Path:
        path = self._measured(step)
        self.evidence.run(step, "latency", "--grid", *self._points(), "--url", serving.urls()["grpc"],
                          "--manifest", repository, "--output", path, *more)  # fmt: skip
        return path

    def _points(self) -> list[str]:
        """The points of the grid, and the one that shows what a long prompt's first token takes."""
        return list(dict.fromkeys([*self.options.grid, speed.prefill_point(self.recipe)]))

    def _measured(self, step: str) -> Path:
        return self.evidence.folder / (LATENCY if step == "speed" else f"{step}-{LATENCY}")

    def _baseline_file(self) -> Path | None:
        made = self._measured("baseline")
        return self.options.baseline or (made if made.exists() else None)

    def _baseline(self) -> list[Line]:
        """The 16-bit engine of the same model, measured at the same points."""
        if not speed.is_weight_only(self.recipe):
            return [Line("baseline.measured", SKIPPED, "this recipe is itself a 16-bit one")]
        if self.options.baseline is not None:
            return [judge("baseline.measured", [], f"given: {self.options.baseline}")]
        folder = self._path("baseline")
        wanted = speed.sixteen_bit(self.recipe)
        recipe_file = write_recipe(wanted, folder / "recipe.yaml")

        def work() -> list[Line]:
            self._make("baseline", "repo", folder, recipe_file)
            with Serving(self.evidence, folder / "repository", recipe_file, "baseline") as serving:
                path = self._latency("baseline", serving, folder / "repository")
            return [judge("baseline.measured", [], speed.shown(speed.read(path)))]

        inputs = [wanted.model_dump(), self._points(), self._source()]
        return self.evidence.do("baseline", inputs, work, made=self._measured("baseline"))

    def _source(self) -> str | None:
        """The model that the checkpoint was made from."""
        with contextlib.suppress(InputError):
            return manifest.read(self._path("checkpoint"), "checkpoint").input.digest
        return None

    def _speed(self, serving: Serving) -> list[Line]:
        baseline = self._baseline_file() if speed.is_weight_only(self.recipe) else None

        def work() -> list[Line]:
            beside: list[str | Path] = ["--beside", baseline] if baseline else []
            path = self._latency("speed", serving, self._path("repository"), *beside)
            return speed.judge_speed(speed.read(path), speed.read(baseline) if baseline else None, on_gpu=self.on_gpu)

        inputs = [self._digest("repository"), self._points(), digest(baseline) if baseline else None]
        return self.evidence.do("speed", inputs, work)


#: Steps without which the ones after them have nothing to look at; others may fail alone.
_STAGES = ("machine", "convert", "build", "repository", "serve", "tokens", "reference")


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


def _force(folder: Path) -> list[str]:
    return ["--force"] if folder.exists() else []
