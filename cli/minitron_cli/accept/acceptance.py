"""The steps of an acceptance in their order: which judges each calls, and what it depends on.

A judge is a function of the room that knows the thing, and returns checks. The pipeline brings stages up to date.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron import files, recipe
from minitron.artifacts import manifest
from minitron.checks import FAIL, SKIPPED, Check, judge
from minitron.console import human_bytes
from minitron.errors import VerdictError
from minitron.machine import compat, gpus_here
from minitron.recipe import Effective
from minitron.recipe_model import Recipe
from minitron_cli import main
from minitron_cli.accept import quality, speed
from minitron_cli.accept.evidence import Evidence, digest
from minitron_cli.accept.serving import FoundServer, Started
from minitron_cli.accept.walk import Step, Walk
from minitron_cli.pipeline import Pipeline

log = logging.getLogger(__name__)

TOKENS, LATENCY = "greedy-tokens.json", "latency.json"


@dataclass(frozen=True)
class Options:
    """What the user chose beside the recipe. ``reference``, ``baseline``: files made elsewhere, or None.

    ``small``: the model that goes the whole way first, None for none. ``keep_going``: past a cheap proof that failed.
    ``only``: see ``walk.chosen``. ``tolerance`` (nats), ``new_tokens``: of the greedy outputs, None for the defaults.
    ``tasks``: words for 'minitron eval' (``quality.words_of``).
    """

    reference: Path | None = None
    baseline: Path | None = None
    grid: tuple[str, ...] = ()
    container: bool = True
    small: Path | None = None
    llmapi: bool = False
    keep_going: bool = False
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)
    tolerance: float | None = None
    new_tokens: int | None = None
    tasks: tuple[str, ...] = ()


@dataclass
class Acceptance:
    """One acceptance in ``folder``; ``walk`` gives the checks step by step.

    ``given``: what is there already, by stage; the other stages are folders of the acceptance, made there. ``running``:
    the server to ask, None for one of our own.
    """

    recipe: Recipe
    folder: Path
    evidence: Evidence
    options: Options
    given: Mapping[str, Path] = field(default_factory=dict)
    running: FoundServer | None = None

    def __post_init__(self) -> None:
        options = self.options
        self._walk = Walk(self.evidence, self.on_gpu, options.only, bool(self.given), options.keep_going)

    @property
    def on_gpu(self) -> bool:
        """Whether a TensorRT engine is accepted."""
        return self.recipe.target != "cpu"

    @property
    def recipe_file(self) -> Path:
        """The recipe with every layer applied, for whoever repeats a step."""
        return self.folder / "recipe.yaml"

    def path(self, name: str) -> Path:
        """A folder or file of the acceptance, or what was given for it."""
        return self.given.get(name, self.folder / name)

    @property
    def tokens_file(self) -> Path:
        """The greedy outputs of the engine."""
        return self.given.get("tokens", self.evidence.folder / TOKENS)

    def digest_of(self, stage: str) -> str:
        """Digest of a stage's manifest; raises InputError."""
        return manifest.read(self.path(stage), stage).digest

    # --- walking ----------------------------------------------------------------------------------------------------

    def walk(self) -> Iterator[tuple[str, list[Check]]]:
        """Do what is not done, in order; yields each step's name and checks."""
        from minitron_cli.accept import engines_beside as beside

        before = (
            Step("tool", (), self._tool),
            Step("small", (), lambda: beside.small(self)),
            Step("machine", (), self._machine),
            Step("convert", (), lambda: self._made("convert", "convert.done", "checkpoint")),
            Step("checkpoint", ("convert",), self._checkpoint),
            Step("build", ("convert", *self._if_gpu("machine")), lambda: self._made("build", "build.done", "engine")),
            Step("engine", ("build",), self._engine),
            Step("repository", ("build",), self._repository),
        )
        served = self.running or Started(self.evidence, self.path("repository"), self.recipe_file, "serve")
        asked = (
            Step("serve", ("repository",), lambda: self._serve(served)),
            Step("audit", ("serve",), lambda: self._audit(served)),
            Step("tokens", ("serve",), lambda: self._tokens(served)),
            Step("bursts", ("serve",), lambda: self._bursts(served)),
            Step("speed", ("serve",), lambda: self._speed(served)),
            Step("behaviour", ("serve",), lambda: self._behaviour(served)),
            Step("tasks", ("serve",), lambda: self._tasks(served)),
            Step("stopped", ("serve",), lambda: self._stopped(served)),
        )
        after = (
            Step("baseline", ("speed", *self._if_gpu("machine")), lambda: beside.baseline(self)),
            Step("llmapi", self._if_gpu("machine"), lambda: beside.llmapi(self)),
            Step("reference", ("convert", *self._if_gpu("tokens")), lambda: beside.reference(self)),
            Step("words", ("tokens", "reference"), self._words),
        )
        wanted = self._walk.wanted((*before, *asked, *after))
        yield from self._walk.through(before, wanted)
        with served:
            yield from self._walk.through(asked, wanted)
        yield from self._walk.through(after, wanted)

    def _if_gpu(self, *steps: str) -> tuple[str, ...]:
        return steps if self.on_gpu else ()

    # --- what is made -----------------------------------------------------------------------------------------------

    def _machine(self) -> Sequence[Check]:
        facts = [vars(gpu) for gpu in gpus_here.gpus()], shutil.which("docker")

        def work() -> Sequence[Check]:
            from minitron_cli.doctor import diagnose

            found = diagnose(self.recipe, Path.cwd()).checks
            problems = [f"{one.subject}: {one.message} ({one.remedy})" for one in found if one.level == FAIL]
            return [judge("machine.ready", problems, f"{len(found)} checks, none failed")]

        return self.evidence.do("machine", [self.recipe.model_dump(), facts], work)

    def make(self, until: str, folder: Path, effective: Effective, checkpoint: Path | None = None) -> None:
        """Bring the stages in ``folder`` up to date; the pipeline knows by itself what is."""
        Pipeline(folder, effective, checkpoint=checkpoint, container=self.options.container).bring_up_to_date(until)

    def _made(self, stage: str, name: str, folder: str) -> Sequence[Check]:
        self.make(stage, self.folder, read_recipe(self.recipe_file))
        record = manifest.read(self.path(folder), folder)
        size = sum(file.size for file in record.files.values())
        shown = f"{len(record.files)} files, {size:,} bytes, digest {record.digest[:16]}"
        return [judge(name, [], shown + _beside_the_plan(record.details))]

    def _repository(self) -> Sequence[Check]:
        self.make("render", self.folder, read_recipe(self.recipe_file))
        repository = self.path("repository")

        def check() -> Sequence[Check]:
            if main.call("check", repository):
                said = self.evidence.log("repository").read_text(encoding="utf-8").splitlines()
                return [judge("repository.checked", [said[-1]], "")]
            models = manifest.read(repository, "repository").details["models"]
            return [judge("repository.checked", [], f"models {', '.join(models)}")]

        return self.evidence.do("repository", self.digest_of("repository"), check)

    # --- what is asked of TensorRT-LLM ------------------------------------------------------------------------------

    def _place(self, step: str) -> Any:
        """Where TensorRT-LLM is asked, and the log of what it says."""
        from minitron_build.probe.asking import Place

        container = self.recipe.container
        image = compat.image(container.image_tag).reference if self.options.container else None
        return Place(image, container, self.evidence.folder / f"{step}-tensorrt-llm.log")

    def _tool(self) -> Sequence[Check]:
        from minitron_build.engines.tensorrt import build
        from minitron_build.probe import tool

        if not self.on_gpu:
            return []
        image = compat.image(self.recipe.container.image_tag)

        def work() -> Sequence[Check]:
            effective = read_recipe(self.recipe_file)
            argv = build.decide_ahead(effective, Path("checkpoint"), Path("engine"), build.Options()).command()
            return self.evidence.keep("tool", tool.judge_tool(self._place("tool"), image, argv))

        return self.evidence.do("tool", [vars(image), self.options.container, self.recipe.model_dump()], work)

    def _checkpoint(self) -> Sequence[Check]:
        from minitron_build.probe import checkpoint

        folder, model = self.path("checkpoint"), self.recipe.model
        ask = self.on_gpu and "machine" not in self._walk.failed

        def work() -> Sequence[Check]:
            place, found = self._place("checkpoint"), checkpoint.judge_files(folder)
            if ask:
                found += checkpoint.judge_loading(place, folder)
                found += checkpoint.judge_codes(place, folder, model.source, model.revision)
            return self.evidence.keep("checkpoint", found)

        return self.evidence.do(
            "checkpoint", [self.digest_of("checkpoint"), ask, self.recipe.container.image_tag], work
        )

    def _engine(self) -> Sequence[Check]:
        from minitron_build.probe.engine import judge_engine

        return self.evidence.do("engine", self.digest_of("engine"),
                                lambda: self.evidence.keep("engine", judge_engine(self.path("engine"))))  # fmt: skip

    # --- what is asked of the server --------------------------------------------------------------------------------

    def _serve(self, serving: FoundServer) -> Sequence[Check]:
        def start() -> Sequence[Check]:
            serving.urls()
            models = manifest.read(self.path("repository"), "repository").details["models"]
            return [judge("serve.ready", [], f"{len(models)} models after {serving.load_s:.1f} s")]

        return self.evidence.do("serve", self.digest_of("repository"), start)

    def _audit(self, serving: FoundServer) -> Sequence[Check]:
        from minitron_triton.audit.judging import inspect_server, judge_all

        def work() -> Sequence[Check]:
            found = inspect_server(self.path("repository"), serving.state())
            return self.evidence.keep("audit", judge_all(found), numbers=found.numbers())

        return self.evidence.do("audit", self.digest_of("repository"), work)

    def tokens_of(self, serving: FoundServer, repository: Path, path: Path) -> Check:
        """Ask a server for the greedy outputs, and keep them at ``path``."""
        from minitron_client.parity import stored

        return stored.judge_stored(serving.endpoint(), repository, path, self.options.new_tokens or stored.NEW_TOKENS)

    def _tokens(self, serving: FoundServer) -> Sequence[Check]:
        from minitron_client.parity import stored

        path = self.tokens_file

        def work() -> Sequence[Check]:
            kept = self.tokens_of(serving, self.path("repository"), path)
            found = [kept, stored.judge_finite("words.finite", path, f"{len(stored.PROMPTS)} prompts")]
            return self.evidence.keep("tokens", found)

        return self.evidence.do("tokens", self.digest_of("repository"), work, made=path)

    def _behaviour(self, serving: FoundServer) -> Sequence[Check]:
        from minitron_client.conformance import suite
        from minitron_client.conformance.subject import Subject

        names = [name for name in suite.CASES if name in self.options.only.get("behaviour", suite.CASES)]

        def work() -> Sequence[Check]:
            urls, found = serving.urls(), []
            with Subject.of_repository(
                serving.endpoint(), self.path("repository"), urls.get("metrics"), urls.get("http")
            ) as subject:
                for check in suite.run(subject, names):
                    log.info("%s %s", check.verdict, check.name)
                    found.append(check)
                engine = subject.engine
            return self.evidence.keep("behaviour", found, url=urls["grpc"], engine=engine)

        return self.evidence.do("behaviour", self.digest_of("repository"), work)

    def _tasks(self, serving: FoundServer) -> Sequence[Check]:
        words, repository, of = self.options.tasks, self.path("repository"), self.digest_of("repository")

        def work() -> Sequence[Check]:
            return quality.judge_tasks(serving, repository, of, words, self.evidence.folder)

        return self.evidence.do("tasks", [of, quality.inputs(words)], work)

    def _stopped(self, serving: FoundServer) -> Sequence[Check]:
        return self.evidence.do(
            "stopped", self.digest_of("repository"), lambda: [judge("serve.stopped", [], serving.end())]
        )

    # --- the same words ---------------------------------------------------------------------------------------------

    def reference_tokens(self) -> Path:
        """Where the outputs are, or will be, that ours are compared with."""
        given = self.options.reference
        if given is None:
            return self.evidence.folder / f"reference-{TOKENS}"
        inside = given / "evidence" / TOKENS
        return inside if inside.exists() else given / TOKENS if given.is_dir() else given

    def _words(self) -> Sequence[Check]:
        from minitron_client.parity.compare import judge_same
        from minitron_client.parity.stored import GreedyOutputs

        if not self.on_gpu and not self.options.only:
            return [Check("words.same", SKIPPED, "only a GPU target can show it")]
        found, reference = self.tokens_file, self.reference_tokens()
        if not reference.exists():
            return [Check("words.same", SKIPPED, "there is no reference")]

        def work() -> Sequence[Check]:
            both = GreedyOutputs.read(found), GreedyOutputs.read(reference)
            return self.evidence.keep("words", [judge_same(*both, self.options.tolerance)])

        return self.evidence.do("words", [digest(found), digest(reference), self.options.tolerance], work)

    # --- speed ------------------------------------------------------------------------------------------------------

    def points(self) -> list[str]:
        """The points of the grid, and the one that shows what a long prompt's first token takes."""
        return list(dict.fromkeys([*self.options.grid, speed.prefill_point(self.recipe)]))

    def measured(self, step: str) -> Path:
        """The document of a latency test."""
        return self.evidence.folder / (LATENCY if step == "speed" else f"{step}-{LATENCY}")

    def latency(self, step: str, serving: FoundServer, repository: Path, points: Collection[str]) -> Path:
        """Run the latency test at ``points``, and return its document; what failed where is added to its error."""
        path = self.measured(step)
        path.unlink(missing_ok=True)
        try:
            main.call("bench", "--grid", *points, *serving.flags(), "--manifest", repository, "--output", path)
        except VerdictError as error:
            reasons = speed.failures(speed.read(path)) if path.exists() else ""
            raise VerdictError(f"{error}{reasons and ': ' + reasons}") from error
        return path

    def _bursts(self, serving: FoundServer) -> Sequence[Check]:
        points = speed.bursts(self.options.grid)

        def work() -> Sequence[Check]:
            path = self.latency("bursts", serving, self.path("repository"), points)
            return [judge("bursts.answered", [], speed.shown(speed.read(path)))]

        return self.evidence.do("bursts", [self.digest_of("repository"), points], work)

    def _speed(self, serving: FoundServer) -> Sequence[Check]:
        def work() -> Sequence[Check]:
            return speed.judge_speed(speed.read(self.latency("speed", serving, self.path("repository"), self.points())))

        return self.evidence.do(
            "speed", [self.digest_of("repository"), self.points()], work, made=self.measured("speed")
        )


def write_recipe(wanted: Recipe, path: Path) -> Effective:
    """Write a recipe as a YAML file (JSON is YAML), and read it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(wanted.model_dump(), indent=1) + "\n")
    return read_recipe(path)


def read_recipe(path: Path) -> Effective:
    """What ``write_recipe`` wrote: all layers are in it, so that none is applied."""
    return recipe.load(str(path), {})


def _beside_the_plan(details: Mapping[str, Any]) -> str:
    """What a build on a GPU took, beside what was planned; nothing where the manifest does not say."""
    if "build_seconds" not in details:
        return ""
    peak, planned = details.get("build_peak_bytes"), details["plan"]["memory"]["weight_bytes"]
    memory = f"{human_bytes(peak)} of memory at the peak" if peak else "its peak memory not known"
    return f"; {details['build_seconds']} s and {memory}, weights by the plan {human_bytes(planned)}"
