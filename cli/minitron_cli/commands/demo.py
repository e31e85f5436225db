"""``minitron demo``: the whole way on this machine, as a user would type it, one command after the other.

It runs the other commands as child processes and knows of their insides no more than their manifests. A stage whose
result is up to date is skipped. However it ends, the server that it started is stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from minitron import children, console, interrupt
from minitron.artifacts import manifest
from minitron.artifacts.manifest import Manifest
from minitron.errors import UsageError
from minitron.machine import compat

_CHECKOUT = Path(__file__).parents[3]
_SMALL_MODEL = Path("models", "small-minitron")
_PROMPT = "In the beginning"
_GRID = ("32:32:1", "32:32:4")  # input tokens : output tokens : streams


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add(
        "--model", metavar="MODEL", help="model folder or Hugging Face id (default: the small Minitron of the checkout)"
    )
    add("--precision", default="auto", metavar="P", help="as 'minitron convert' takes it (default: auto)")
    add("--execution", choices=("exact", "fast"), default="exact", help="as 'minitron build' takes it")
    add("--output", type=Path, default=Path("out", "demo"), metavar="DIR", help="where it works (default %(default)s)")
    add("--prompt", default=_PROMPT, help="what the model is to continue (default %(default)r)")
    add("--fresh", action="store_true", help="make everything anew, also what is up to date")


def run(args: argparse.Namespace) -> int:
    """Go the way; returns the exit code of the first command that fails, or 0."""
    model = args.model or _small_model()
    demo = _Demo(args.output, fresh=args.fresh)
    with children.alone_in(args.output, "demo"), interrupt.by_sigterm():
        try:
            repository = demo.make_repository(model, args.precision, args.execution)
            demo.serve_and_ask(repository, args.prompt)
        except subprocess.CalledProcessError as error:
            return int(error.returncode)
        finally:
            demo.stop()
    print("\n" + console.table(demo.times, ("stage", "seconds")))
    print(_next_steps())
    return 0


class _Demo:
    """One run: its folder, its stages and the time each took."""

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        self._folder, self._fresh = folder, fresh
        self._state = folder / "servers"  # not the user's own, so that only our server is stopped
        self._serving: Path | None = None
        self.times: list[tuple[str, str]] = []

    def make_repository(self, model: str, precision: str, execution: str) -> Path:
        """Convert, build, render and check; returns the model repository."""
        checkpoint, engine, repository = (self._folder / name for name in ("checkpoint", "engine", "repository"))
        self._make(
            "checkpoint", checkpoint, Path(model), {"model": model, "precision": precision},
            "convert", model, "--output", checkpoint, "--precision", precision,
        )  # fmt: skip
        self._make(
            "engine", engine, checkpoint, {"target": "cpu", "execution": execution},
            "build", checkpoint, "--target", "cpu", "--execution", execution, "--output", engine,
        )  # fmt: skip
        self._make(
            "repository", repository, engine, {},
            "render", engine, "--output", repository,
        )  # fmt: skip
        self._run("check", repository)
        return repository

    def serve_and_ask(self, repository: Path, prompt: str) -> None:
        """Start the server, stream an answer, measure, stop."""
        self._serving = repository
        free = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
        text = self._run("serve", repository, "--detach", *free, "--state", self._state, "--json", captured=True)
        url = json.loads(text)["urls"]["grpc"]
        self._run("generate", prompt, "--max-tokens", "64", "--url", url)
        self._run("bench", "--grid", *_GRID, "--tokenizer", repository / "tokenizer", "--url", url)
        self.stop()

    def stop(self) -> None:
        """Stop the server if there is one, whatever the user presses meanwhile."""
        if self._serving is not None:
            with children.deaf_to(signal.SIGINT, signal.SIGTERM):
                self._run("stop", self._serving, "--state", self._state)
            self._serving = None

    def _make(self, stage: str, made: Path, source: Path, arguments: dict[str, Any], *words: str | Path) -> None:
        """Run the command that makes the folder ``made``, unless what it would make is there."""
        if not self._fresh and _is_up_to_date(stage, made, source, arguments):
            _show(f"\n$ minitron {shlex.join(map(str, words))}\n(up to date, skipped)")
            self.times.append((_name(words), "-"))
        else:
            self._run(*words, *(["--force"] if made.exists() else []))

    def _run(self, *words: str | Path, captured: bool = False) -> str:
        """Show a command, run it, note its time; returns its stdout if ``captured``.

        Raises CalledProcessError with its exit code.
        """
        _show(f"\n$ minitron {shlex.join(map(str, words))}")
        started = time.monotonic()
        child = children.run(*words, stdout=subprocess.PIPE if captured else None)
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, child.args)
        self.times.append((_name(words), f"{time.monotonic() - started:.1f}"))
        return child.stdout or ""


def _show(text: str) -> None:
    """Print at once. Where nobody reads any more, say so once: what has to be done after that must not fail again."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _name(words: tuple[str | Path, ...]) -> str:
    """What a command is called: "convert", "render"."""
    return " ".join(map(str, words[:2] if words[0] == "repo" else words[:1]))


def _is_up_to_date(stage: str, made: Path, source: Path, arguments: dict[str, Any]) -> bool:
    """Whether ``made`` is whole, of this toolkit version, of these arguments, and of what ``source`` now holds."""
    record = manifest.current(made, stage)
    return (
        record is not None
        and all(record.arguments.get(name) == value for name, value in arguments.items())
        # A repository holds the place where it lies.
        and record.details.get("root", os.path.abspath(made)) == os.path.abspath(made)
        and _holds_what_was_read(record, source)
    )


def _holds_what_was_read(record: Manifest, source: Path) -> bool:
    if record.input.files:  # a model: it has no manifest of its own
        return manifest.model_unchanged(record.input, source)
    before = manifest.whole(source, record.input.kind)
    return before is not None and record.input.digest == before.digest


def _small_model() -> str:
    for folder in (Path.cwd(), _CHECKOUT):
        if (folder / _SMALL_MODEL).is_dir():
            return str(_SMALL_MODEL if folder == Path.cwd() else folder / _SMALL_MODEL)
    raise UsageError(f"{_SMALL_MODEL} is not here (it comes with a checkout of the project); give --model")


def _next_steps() -> str:
    return f"""
Next, on an A100 (written for it, not run here):
  minitron convert nvidia/Minitron-4B-Base --precision int8_weight_only --output out/4b-int8      # anywhere, no GPU
  minitron build out/4b-int8 --target a100-80gb --output out/4b-int8-a100      # inside {compat.image().reference}
  minitron render out/4b-int8-a100 --output out/4b-int8-repository
  minitron serve out/4b-int8-repository      # starts that container
README.md, "On an A100", says more."""
