"""``minitron make STAGE``: bring checkpoint, engine and repository of a recipe up to date, and run no more than that.

Behind ``make convert``, ``make build``, ``make repo`` and ``make a100``. It composes the other commands and knows of
their insides no more than their manifests: a stage is left alone when its folder is whole (size and time of every file,
nothing is hashed) and was made from what lies before it, for the same recipe. ``minitron check`` is what hashes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from minitron import children, files, recipe
from minitron.artifacts import manifest
from minitron.artifacts.manifest import Manifest
from minitron.recipe import Effective
from minitron.recipe_model import Calibration

STAGES = ("convert", "build", "repo", "a100")
_REPOSITORY_RECIPE = "repository-recipe.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("stage", choices=STAGES, help="how far to go; a100: all of it, in the container")
    parser.add_argument("--directory", type=Path, required=True, metavar="DIR", help="where the stages' folders lie")
    recipe.add_flags(parser, "model.source", "model.revision")
    parser.add_argument("--container", action="store_true", help="run trtllm-build in the pinned image")
    parser.add_argument("--dry-run", action="store_true", help="print every command and run none")


def run(args: argparse.Namespace) -> int:
    """Run what is not done yet, and say what is."""
    way = _Way(
        args.directory, recipe.from_args(args), args.recipe, args.container or args.stage == "a100", args.dry_run
    )
    try:
        way.go(args.stage)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    return 0


@dataclass(frozen=True)
class _Way:
    """One recipe's folders below ``directory``."""

    directory: Path
    effective: Effective
    recipe_name: str | None
    container: bool
    dry_run: bool

    @property
    def _checkpoint(self) -> Path:
        return self.directory / "checkpoint"

    @property
    def _engine(self) -> Path:
        return self.directory / "engine"

    @property
    def _repository(self) -> Path:
        return self.directory / "repository"

    def go(self, stage: str) -> None:
        """Up to ``stage``, in order."""
        model = self.effective.recipe.model
        chosen = ["--recipe", self.recipe_name] if self.recipe_name else []
        revision = ["--revision", model.revision] if model.revision else []
        if stage == "a100":
            self._do("plan", "--model", model.source, *revision, *chosen)
        if self.effective.recipe.backend == "llmapi":
            self._render(model.source, "--backend", "llmapi", *chosen)
        else:
            self._convert(model.source, *revision, *chosen)
            if stage != "convert":
                self._build(*chosen)
            if stage in ("repo", "a100"):
                self._render(str(self._engine), *chosen)
        if stage == "a100":
            self._do("check", str(self._repository))
            self._do("serve", str(self._repository), *chosen, "--dry-run")  # prints how it is started

    def _convert(self, *words: str) -> None:
        if self._checkpoint_is_done():
            print(f"checkpoint: {self._checkpoint} is up to date")
            return
        self._do("convert", *words, "--output", str(self._checkpoint), *_force(self._checkpoint))

    def _build(self, *words: str) -> None:
        """The command knows by itself whether its output is what was asked for; --force only replaces another."""
        place = [str(self._checkpoint), *words, "--output", str(self._engine)]
        on_gpu = self.effective.recipe.target != "cpu"
        where = ["--container"] if self.container and on_gpu else []
        self._do("build", *place, *where, *_force(self._engine))
        if self.dry_run and on_gpu:  # what it would run in turn
            self._show("build", *place, *where, "--model", self.effective.recipe.model.source, "--dry-run")

    def _render(self, source: str, *words: str) -> None:
        if self._repository_is_done(source):
            print(f"repository: {self._repository} is up to date")
            return
        self._do("render", source, *words, "--output", str(self._repository), *_force(self._repository))
        if not self.dry_run:
            files.write_text(self.directory / _REPOSITORY_RECIPE, self._recipe_text())

    def _checkpoint_is_done(self) -> bool:
        record = manifest.current(self._checkpoint, "checkpoint")
        if record is None:
            return False
        wanted = self.effective.recipe
        asked = {
            "model": wanted.model.source, "revision": wanted.model.revision, "precision": wanted.precision,
            "dtype": wanted.dtype, "tp": wanted.tensor_parallel, "pp": wanted.pipeline_parallel,
            "use_parallel_embedding": wanted.use_parallel_embedding,
            "embedding_sharding_dim": wanted.embedding_sharding_dim, "group_size": wanted.group_size,
            "kv_cache": wanted.kv_cache,
        }  # fmt: skip
        same = all(record.arguments.get(name) == value for name, value in asked.items())
        return same and _calibrated_as(wanted.calibration, record) and _model_is_the_same(record)

    def _repository_is_done(self, source: str) -> bool:
        record, kept = manifest.current(self._repository, "repository"), self.directory / _REPOSITORY_RECIPE
        if record is None or not kept.exists() or kept.read_text(encoding="utf-8") != self._recipe_text():
            return False
        if record.input.kind != "engine":
            return _model_is_the_same(record)
        engine = manifest.whole(Path(source), "engine")
        return engine is not None and engine.digest == record.input.digest

    def _recipe_text(self) -> str:
        return json.dumps(self.effective.recipe.model_dump(), indent=1) + "\n"

    def _do(self, *words: str) -> None:
        """Print a command and, unless this is a dry run, run it. Raises CalledProcessError."""
        print(f"minitron {shlex.join(words)}", flush=True)
        if not self.dry_run:
            subprocess.run([*children.COMMAND, *words], check=True)

    def _show(self, *words: str) -> None:
        """Run a command that only prints."""
        subprocess.run([*children.COMMAND, *words], check=True)


def _calibrated_as(asked: Calibration, record: Manifest) -> bool:
    """Whether a checkpoint that was calibrated was with that text."""
    kept = record.arguments.get("calibration")
    return kept is None or [asked.text, asked.sequences, asked.tokens] == [
        kept["file"], kept["sequences"], kept["tokens"]
    ]  # fmt: skip


def _model_is_the_same(record: Manifest) -> bool:
    """A downloaded model may have left the cache; one that is here must still be what was read."""
    source = Path(record.input.path)
    return not source.exists() or manifest.model_unchanged(record.input, source)


def _force(folder: Path) -> list[str]:
    return ["--force"] if folder.exists() else []
