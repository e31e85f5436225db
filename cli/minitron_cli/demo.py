"""The whole way on this machine, as a user would type it: the stages, then a server that is asked and measured."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path

from minitron import children, console
from minitron.machine import compat
from minitron.recipe import Effective
from minitron_cli.pipeline import Pipeline, StageFailed, flags_of, show

_GRID = ("32:32:1", "32:32:4")  # input tokens : output tokens : streams
_FREE = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")


class Demo:
    """One run of it in ``folder``; however it ends, the server that it started is stopped."""

    def __init__(self, folder: Path, pipeline: Pipeline, effective: Effective) -> None:
        self._pipeline, self._effective, self._dry_run = pipeline, effective, False
        self._state = folder / "servers"  # not the user's own, so that only our server is stopped
        self._serving = False

    def run(self, prompt: str, *, dry_run: bool) -> None:
        """All of it, and the time each command took; raises MinitronError with the exit code of what failed."""
        self._dry_run = dry_run
        try:
            self._pipeline.bring_up_to_date()
            url = self._serve()
            self._pipeline.run("generate", prompt, "--max-tokens", "64", "--url", url)
            tokenizer = str(self._pipeline.repository / "tokenizer")
            self._pipeline.run("bench", "--grid", *_GRID, "--tokenizer", tokenizer, "--url", url)
            self._stop()
        except BrokenPipeError:  # nobody reads any more, and the server has to be stopped all the same
            console.discard_stdout()
            raise
        finally:
            self._stop()
        if not dry_run:
            print("\n" + console.table(self._pipeline.times, ("stage", "seconds")))
            print(_next_steps())

    def _serve(self) -> str:
        """Start the server, a process of its own; returns its gRPC address."""
        words = ["serve", str(self._pipeline.repository), "--detach", *_FREE, "--state", str(self._state), "--json"]
        words += flags_of(self._effective, words)
        show(f"\n$ minitron {shlex.join(words)}")
        if self._dry_run:
            return "127.0.0.1:PORT"
        started, self._serving = time.monotonic(), True
        done = children.run(*words, stdout=subprocess.PIPE)
        if done.returncode:
            raise StageFailed(words, done.returncode)
        self._pipeline.times.append(("serve", f"{time.monotonic() - started:.1f}"))
        return str(json.loads(done.stdout)["urls"]["grpc"])

    def _stop(self) -> None:
        """Stop the server if there is one, whatever the user presses meanwhile."""
        if self._serving:
            with children.signals_ignored(signal.SIGINT, signal.SIGTERM):
                self._serving = False
                self._pipeline.run("stop", str(self._pipeline.repository), "--state", str(self._state))


def _next_steps() -> str:
    return f"""
Next, on an A100 (written for it, not run here):
  minitron plan --recipe a100-int8      # anywhere: does it fit, how fast can it be
  minitron up --recipe a100-int8 --model nvidia/Minitron-4B-Base --container --serve
The second builds for a100-80gb and serves, both in {compat.image().reference}.
README.md, "On an A100", says more."""
