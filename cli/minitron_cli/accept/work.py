"""What every step of an acceptance works with: the recipe, its folder and evidence, and the commands that it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minitron import acceptance, files
from minitron.acceptance import Line, judge
from minitron.artifacts import manifest
from minitron.errors import InputError
from minitron.recipe_model import Recipe
from minitron_cli.accept import speed
from minitron_cli.accept.evidence import Evidence, StepFailed
from minitron_cli.accept.serving import Serving

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
class Work:
    """One acceptance in ``folder``."""

    recipe: Recipe
    folder: Path
    evidence: Evidence
    options: Options

    @property
    def on_gpu(self) -> bool:
        """Whether a TensorRT engine is accepted."""
        return self.recipe.target != "cpu"

    @property
    def recipe_file(self) -> Path:
        """The recipe with every layer applied, as every step takes it."""
        return self.folder / "recipe.yaml"

    def path(self, name: str) -> Path:
        """A folder or file of the acceptance."""
        return self.folder / name

    def make(self, step: str, stage: str, folder: Path, recipe_file: Path) -> None:
        """``minitron make`` knows by itself what is up to date."""
        container = self.place() if self.on_gpu else []
        self.evidence.run(step, "make", stage, "--directory", folder, "--recipe", recipe_file, *container)

    def digest_of(self, stage: str) -> str:
        """Digest of a stage's manifest; raises InputError."""
        return manifest.read(self.path(stage), stage).digest

    def place(self) -> list[str]:
        """Where TensorRT-LLM is asked and built with."""
        return ["--container"] if self.options.container else []

    def judged(self, step: str, *words: str | Path) -> list[Line]:
        """Lines of a command that judges."""
        path = self.evidence.folder / f"{step}.json"
        self.evidence.run(step, *words, "--output", path, verdict=True)
        return acceptance.read(path)[0]

    def latency(self, step: str, serving: Serving, repository: Path, points: Sequence[str]) -> Path:
        """Run the latency test at ``points``, and return its document; raises StepFailed with what failed where."""
        path, url = self.measured(step), serving.urls()["grpc"]
        path.unlink(missing_ok=True)
        try:
            self.evidence.run(step, "bench", "--grid", *points, "--url", url, "--manifest", repository,
                              "--output", path)  # fmt: skip
        except StepFailed as failure:
            reasons = speed.failures(speed.read(path)) if path.exists() else ""
            raise replace(failure, said=f"{failure.said}{reasons and ': ' + reasons}") from None
        return path

    def points(self) -> list[str]:
        """The points of the grid, and the one that shows what a long prompt's first token takes."""
        return list(dict.fromkeys([*self.options.grid, speed.prefill_point(self.recipe)]))

    def measured(self, step: str) -> Path:
        """The document of a latency test."""
        return self.evidence.folder / (LATENCY if step == "speed" else f"{step}-{LATENCY}")


def write_recipe(wanted: Recipe, path: Path) -> Path:
    """Write a recipe as a YAML file (JSON is YAML); returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(wanted.model_dump(), indent=1) + "\n")
    return path


def finite(name: str, tokens: Path, shown: str) -> Line:
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


def force(folder: Path) -> list[str]:
    """The flag that replaces a folder, where there is one."""
    return ["--force"] if folder.exists() else []
