"""The steps of an acceptance in their order, composed of other commands: what each runs, and what it depends on.

Nothing here knows the inside of a room; steps speak through manifests and the documents that commands leave.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron import acceptance
from minitron.acceptance import FAIL, SKIPPED, Line, judge, of_step
from minitron.artifacts import manifest
from minitron.console import human_bytes
from minitron.errors import InputError, MachineError
from minitron.machine import compat, gpus_here
from minitron_cli.accept import engines_beside, speed
from minitron_cli.accept.evidence import StepFailed, digest
from minitron_cli.accept.serving import Serving
from minitron_cli.accept.work import TOKENS, Work, finite

log = logging.getLogger(__name__)


@dataclass
class Way(Work):
    """One acceptance in ``folder``; ``walk`` gives the lines step by step."""

    _failed: set[str] = field(default_factory=set)

    def walk(self) -> Iterator[tuple[str, list[Line]]]:
        """Do what is not done, in order; yields each step's name and lines."""
        steps: list[tuple[str, tuple[str, ...], Callable[[], list[Line]]]] = [
            ("tool", (), self._tool),
            ("small", (), lambda: engines_beside.small(self)),
            ("machine", (), self._machine),
            ("convert", (), lambda: self._made("convert", "convert.done", "checkpoint")),
            ("checkpoint", ("convert",), self._checkpoint),
            ("build", ("convert", *self._if_gpu("machine")), lambda: self._made("build", "build.done", "engine")),
            ("engine", ("build",), self._engine),
            ("repository", ("build",), self._repository),
        ]
        for name, needs, work in steps:
            yield name, self._step(name, needs, work)
        with Serving(self.evidence, self.path("repository"), self.recipe_file, "serve") as serving:
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
        for name, needs, work in (
            ("baseline", ("speed", *self._if_gpu("machine")), lambda: engines_beside.baseline(self)),
            ("llmapi", self._if_gpu("machine"), lambda: engines_beside.llmapi(self)),
            ("reference", ("convert", *self._if_gpu("tokens")), lambda: engines_beside.reference(self)),
            ("words", ("tokens", "reference"), self._words),
        ):
            yield name, self._step(name, needs, work)

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
        if self.options.keep_going or not self.on_gpu:
            return None
        return next((step for step in _PROOFS if step in self._failed), None)

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
        self.make(stage, stage, self.folder, self.recipe_file)
        record = manifest.read(self.path(folder), folder)
        size = sum(file.size for file in record.files.values())
        shown = f"{len(record.files)} files, {size:,} bytes, digest {record.digest[:16]}"
        return [judge(line, [], shown + _beside_the_plan(record.details))]

    def _repository(self) -> list[Line]:
        self.make("repository", "repo", self.folder, self.recipe_file)
        repository = self.path("repository")

        def check() -> list[Line]:
            self.evidence.run("repository", "check", repository)
            models = manifest.read(repository, "repository").details["models"]
            return [judge("repository.checked", [], f"models {', '.join(models)}")]

        return self.evidence.do("repository", self.digest_of("repository"), check)

    # --- what is asked of TensorRT-LLM ------------------------------------------------------------------------------

    def _asked_of_tensorrt(self, step: str) -> list[str | Path]:
        """The words with which a probe asks TensorRT-LLM itself."""
        return [
            "--recipe",
            self.recipe_file,
            *self.place(),
            "--log",
            self.evidence.folder / f"{step}-tensorrt-llm.log",
        ]

    def _tool(self) -> list[Line]:
        if not self.on_gpu:
            return []
        image = compat.image(self.recipe.container.image_tag)
        words: list[str | Path] = ["probe", "tool", *self._asked_of_tensorrt("tool"), "--recipe", self.recipe_file]
        inputs = [vars(image), self.options.container, self.recipe.model_dump()]
        return self.evidence.do("tool", inputs, lambda: self.judged("tool", *words))

    def _checkpoint(self) -> list[Line]:
        checkpoint = self.path("checkpoint")
        words: list[str | Path] = ["probe", "checkpoint", checkpoint]
        ask = self.on_gpu and "machine" not in self._failed
        if ask:
            model = self.recipe.model
            revision = ["--revision", model.revision] if model.revision else []
            words += ["--model", model.source, *revision, *self._asked_of_tensorrt("checkpoint")]
        else:
            words.append("--files-only")
        inputs = [self.digest_of("checkpoint"), ask, self.recipe.container.image_tag]
        return self.evidence.do("checkpoint", inputs, lambda: self.judged("checkpoint", *words))

    def _engine(self) -> list[Line]:
        return self.evidence.do("engine", self.digest_of("engine"),
                                lambda: self.judged("engine", "probe", "engine", self.path("engine")))  # fmt: skip

    # --- what is asked of the server --------------------------------------------------------------------------------

    def _serve(self, serving: Serving) -> list[Line]:
        def start() -> list[Line]:
            serving.urls()
            models = manifest.read(self.path("repository"), "repository").details["models"]
            return [judge("serve.ready", [], f"{len(models)} models after {serving.load_s:.1f} s")]

        return self.evidence.do("serve", self.digest_of("repository"), start)

    def _audit(self, serving: Serving) -> list[Line]:
        def work() -> list[Line]:
            serving.urls()
            return self.judged("audit", "audit", self.path("repository"), "--state", serving.state)

        return self.evidence.do("audit", self.digest_of("repository"), work)

    def _tokens(self, serving: Serving) -> list[Line]:
        path = self.evidence.folder / TOKENS

        def work() -> list[Line]:
            stored = self.judged("tokens", "tokens", "store", self.path("repository"), "--tokens", path,
                                  "--url", serving.urls()["grpc"])  # fmt: skip
            return [*stored, finite("words.finite", path, "20 prompts")]

        return self.evidence.do("tokens", self.digest_of("repository"), work, made=path)

    def _behaviour(self, serving: Serving) -> list[Line]:
        def work() -> list[Line]:
            urls = serving.urls()
            return self.judged("behaviour", "conformance", self.path("repository"), "--url", urls["grpc"],
                                "--http-url", urls["http"], "--metrics-url", urls["metrics"])  # fmt: skip

        return self.evidence.do("behaviour", self.digest_of("repository"), work)

    def _stopped(self, serving: Serving) -> list[Line]:
        return self.evidence.do(
            "stopped", self.digest_of("repository"), lambda: [judge("serve.stopped", [], serving.end())]
        )

    # --- the same words ---------------------------------------------------------------------------------------------

    def _words(self) -> list[Line]:
        if not self.on_gpu:
            return [Line("words.same", SKIPPED, "only a GPU target can show it")]
        found, reference = self.evidence.folder / TOKENS, engines_beside.reference_tokens(self)
        if not reference.exists():
            return [Line("words.same", SKIPPED, "there is no reference")]
        return self.evidence.do("words", [digest(found), digest(reference)],
                                lambda: self.judged("words", "tokens", "compare", found, reference))  # fmt: skip

    # --- speed ------------------------------------------------------------------------------------------------------

    def _bursts(self, serving: Serving) -> list[Line]:
        points = speed.bursts(self.options.grid)

        def work() -> list[Line]:
            path = self.latency("bursts", serving, self.path("repository"), points)
            return [judge("bursts.answered", [], speed.shown(speed.read(path)))]

        return self.evidence.do("bursts", [self.digest_of("repository"), points], work)

    def _speed(self, serving: Serving) -> list[Line]:
        def work() -> list[Line]:
            return speed.judge_speed(speed.read(self.latency("speed", serving, self.path("repository"), self.points())))

        return self.evidence.do(
            "speed", [self.digest_of("repository"), self.points()], work, made=self.measured("speed")
        )


#: Steps without which the ones after them have nothing to look at; others may fail alone.
_STAGES = ("machine", "convert", "build", "repository", "serve", "tokens", "speed", "reference")
#: Steps that cost minutes and tell that the hour would be lost: where one fails on a GPU, it ends there.
_PROOFS = ("tool", "small", "machine", "convert", "checkpoint")


def _beside_the_plan(details: Mapping[str, Any]) -> str:
    """What a build on a GPU took, beside what was planned; nothing where the manifest does not say."""
    if "build_seconds" not in details:
        return ""
    peak, planned = details.get("build_peak_bytes"), details["plan"]["memory"]["weight_bytes"]
    memory = f"{human_bytes(peak)} of memory at the peak" if peak else "its peak memory not known"
    return f"; {details['build_seconds']} s and {memory}, weights by the plan {human_bytes(planned)}"
