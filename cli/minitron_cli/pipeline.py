"""The way of a recipe through its stages: model -> checkpoint -> engine -> repository, each done once.

A stage is a command, printed as a user would type it and run in this process. It is left alone when its folder is whole
and of this version (``manifest.current``: size and time of every file, nothing is hashed) and was made from what lies
before it, for the same recipe; of an engine ``minitron build`` itself knows that. ``minitron check`` is what hashes.

The stages leave little in memory (a model of 2 GB: 0.2 GB after all three), so that one process does for all of them;
the peak that a command prints is that of the process.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from minitron import console, files, recipe
from minitron.artifacts import manifest
from minitron.artifacts.manifest import Manifest
from minitron.errors import MinitronError
from minitron.recipe import Effective
from minitron.recipe_model import Calibration
from minitron_cli import main

#: The stages in order.
STAGES = ("convert", "build", "render")
_RECIPE = "repository-recipe.json"
#: Fields of a recipe's section ``serving`` that no stage is made of, but the server is started by.
OF_THE_SERVER = ("grpc_port", "http_port", "metrics_port", "exit_timeout_s")


class StageFailed(MinitronError):
    """A command that said by itself what is wrong ended with ``exit_code``."""

    def __init__(self, words: Iterable[str], exit_code: int) -> None:
        super().__init__(f"'minitron {shlex.join(words)}' ended with {exit_code}, see what it said")
        self.exit_code = exit_code


class Pipeline:
    """The stages of one recipe, in folders below ``folder``: ``checkpoint``, ``engine``, ``repository``.

    ``checkpoint``: another folder that is there already, and that the way begins at. ``container``: build in the pinned
    image. ``dry_run``: print every command and run none. ``fresh``: leave nothing alone but what ``build`` does.
    ``times``: (command, seconds as text) of all that was run or left alone.
    """

    def __init__(
        self, folder: Path, effective: Effective, *, checkpoint: Path | None = None, container: bool = False,
        dry_run: bool = False, fresh: bool = False,
    ) -> None:  # fmt: skip
        self._folder, self._effective, self._recipe = folder, effective, effective.recipe
        self._given = checkpoint is not None
        self.checkpoint, self.engine = checkpoint or folder / "checkpoint", folder / "engine"
        self.repository = folder / "repository"
        self._container = container and self._recipe.target != "cpu"
        self._dry_run, self._fresh = dry_run, fresh
        self.times: list[tuple[str, str]] = []

    def bring_up_to_date(self, until: str = STAGES[-1]) -> None:
        """Do what is not done, up to the stage ``until``; raises MinitronError with the exit code of what failed."""
        model = self._recipe.model
        revision = ["--revision", model.revision] if model.revision else []
        if self._recipe.backend == "llmapi":
            self._render(model.source, "--backend", "llmapi")
            return
        if not self._given:
            self._convert(model.source, *revision)
        if until != "convert":
            self._build()
        if until == "render":
            self._render(str(self.engine))

    def _convert(self, *model: str) -> None:
        done = self.is_done("convert")
        self.run("convert", *model, "--output", str(self.checkpoint), *_force(self.checkpoint), done=done)

    def _build(self) -> None:
        """The command knows by itself whether its output is what was asked for; --force only replaces another."""
        before = manifest.intact(self.engine, "engine")
        place = [str(self.checkpoint), "--output", str(self.engine), *(["--container"] if self._container else [])]
        self.run("build", *place, *_force(self.engine))
        if self._dry_run and self._recipe.target != "cpu":  # what it would run in turn
            main.call("build", *place, "--dry-run", effective=self._effective)
        elif before is not None and manifest.intact(self.engine, "engine") == before:
            self.times[-1] = (self.times[-1][0], "-")

    def _render(self, source: str, *backend: str) -> None:
        done = self.is_done("render", Path(source))
        self.run("render", source, *backend, "--output", str(self.repository), *_force(self.repository), done=done)
        if not done:
            self.run("check", str(self.repository))
        if not done and not self._dry_run:
            files.write_text(self._folder / _RECIPE, self._recipe_text())

    def run(self, *words: str, done: bool = False) -> None:
        """Show a command with the flags of the recipe, and, unless it is ``done`` or this is a dry run, run it."""
        shown = [*words, *flags_of(self._effective, words)]
        show(f"\n$ minitron {shlex.join(shown)}")
        name = words[0]
        if done:
            show("(up to date, skipped)")
        if done or self._dry_run:
            self.times.append((name, "-"))
            return
        started = time.monotonic()
        if code := main.call(*shown, effective=self._effective):
            raise StageFailed(shown, code)
        self.times.append((name, f"{time.monotonic() - started:.1f}"))

    def is_done(self, stage: str, source: Path | None = None) -> bool:
        """Whether ``convert``, or ``render`` of ``source``, has nothing to do; of an engine ``build`` knows that."""
        if self._fresh:
            return False
        return self._checkpoint_is_done() if stage == "convert" else self._repository_is_done(source or self.engine)

    def _checkpoint_is_done(self) -> bool:
        record = manifest.current(self.checkpoint, "checkpoint")
        if record is None:
            return False
        wanted = self._recipe
        asked = {
            "model": wanted.model.source, "revision": wanted.model.revision, "precision": wanted.precision,
            "dtype": wanted.dtype, "tp": wanted.tensor_parallel, "pp": wanted.pipeline_parallel,
            "use_parallel_embedding": wanted.use_parallel_embedding,
            "embedding_sharding_dim": wanted.embedding_sharding_dim, "group_size": wanted.group_size,
            "kv_cache": wanted.kv_cache,
        }  # fmt: skip
        same = all(record.arguments.get(name) == value for name, value in asked.items())
        return same and _calibrated_as(wanted.calibration, record) and _model_is_the_same(record)

    def _repository_is_done(self, source: Path) -> bool:
        record, kept = manifest.current(self.repository, "repository"), self._folder / _RECIPE
        if record is None or not kept.exists() or kept.read_text(encoding="utf-8") != self._recipe_text():
            return False
        if self._recipe.target == "cpu" and record.details["root"] != os.path.abspath(self.repository):
            return False  # it was moved, and holds the place where it lay
        if record.input.kind != "engine":
            return _model_is_the_same(record)
        engine = manifest.intact(source, "engine")
        return engine is not None and engine.digest == record.input.digest

    def _recipe_text(self) -> str:
        return json.dumps(self._recipe.model_dump(exclude={"serving": set(OF_THE_SERVER)}), indent=1) + "\n"


def flags_of(effective: Effective, words: Sequence[str]) -> list[str]:
    """``--recipe`` and every flag that was given for it, as far as the command ``words[0]`` has them.

    The model is not among them: the one stage that reads it has it as a word.
    """
    has = {action.dest for action in main.parser_of(words[0])._actions if action.option_strings}
    if "recipe" not in has:
        return []
    given = [("recipe", "--recipe", effective.name)] if effective.name != "defaults" else []
    for path, value, origin in effective.rows():
        if origin.startswith("flag ") and value is not None and not path.startswith("model."):
            given.append((recipe.dest_of(path), recipe.flag_of(path), "" if value is True else str(value)))
    wanted = [(flag, value) for dest, flag, value in given if dest in has and flag not in words]
    return [text for pair in wanted for text in pair if text]


def show(text: str) -> None:
    """Print at once. Where nobody reads any more, say so once: what has to be done after that must not fail again."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        console.discard_stdout()
        raise


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
