"""Running trtllm-build in a child process: a live log, its peak memory, and an end for it whatever happens to us."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron import extras, interrupt
from minitron.errors import MissingDependency, NotEnoughMemory, ToolError
from minitron.machine import docker

log = logging.getLogger(__name__)

_LAST_LINES = 40
_GRACE_S = 10.0
_SIGKILL_CODES = (-signal.SIGKILL, 128 + signal.SIGKILL)
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|std::bad_alloc|Cannot allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class Finished:
    """A child that ended well: ``seconds`` it took, ``peak_bytes`` of its largest process."""

    seconds: float
    peak_bytes: int


def run(
    argv: Sequence[str],
    log_file: Path,
    *,
    cwd: Path,
    timeout_s: float | None = None,
    stop: Callable[[], None] | None = None,
) -> Finished:
    """Run ``argv`` in ``cwd`` in a process group of its own; its output goes to ``log_file`` and, as it comes, our log.

    The group is ended when we are interrupted, told to terminate, or ``timeout_s`` is over; ``stop`` is called then too
    (for what is not our child, such as a container). Raises MachineError, ToolError.
    """
    if argv[0] == "docker":
        docker.check_is_here()
    log.info("%s", shlex.join(argv))
    log_file.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        child = subprocess.Popen(
            argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise MissingDependency(_how_to_get(argv[0])) from None
    last: deque[str] = deque(maxlen=_LAST_LINES)
    with interrupt.by_sigterm(), _ended_after(child, timeout_s) as ran_out:
        try:
            with open(log_file, "w", encoding="utf-8") as file:
                for line in child.stdout or ():
                    file.write(line)
                    file.flush()
                    last.append(line.rstrip())
                    log.info("%s", line.rstrip())
            code, peak = _reap(child)
        except BaseException:
            _end(child)
            if stop:
                stop()
            raise
    if ran_out.is_set():
        if stop:
            stop()
        raise ToolError(f"{argv[0]} did not end within {timeout_s:g} s and was stopped; its log is {log_file}")
    if code:
        raise _explain(argv[0], code, last, peak, log_file)
    return Finished(time.monotonic() - started, peak)


def _reap(child: subprocess.Popen[str]) -> tuple[int, int]:
    """Exit code, and peak resident bytes of the largest process of the child's tree."""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_maxrss * 1024


def _end(child: subprocess.Popen[str]) -> None:
    """End the child's process group: ask, wait, and kill what is left."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        if child.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE_S)


@contextlib.contextmanager
def _ended_after(child: subprocess.Popen[str], timeout_s: float | None) -> Iterator[threading.Event]:
    """End the child when the time is over, and say so by the event."""
    ran_out = threading.Event()

    def kill() -> None:
        ran_out.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    timer = threading.Timer(timeout_s, kill) if timeout_s else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield ran_out
    finally:
        if timer:
            timer.cancel()


def _explain(program: str, code: int, last: deque[str], peak: int, log_file: Path) -> ToolError | NotEnoughMemory:
    told = next((line for line in reversed(last) if _OUT_OF_MEMORY.search(line)), None)
    if told is not None:
        return NotEnoughMemory(f"{program} ran out of memory ({told.strip()}); 'minitron plan' shows what is needed, "
                               f"and the log is {log_file}")  # fmt: skip
    if code in _SIGKILL_CODES:
        return NotEnoughMemory(
            f"{program} was killed at {peak / 1e9:.2f} GB, as the kernel does when memory runs out; free some memory "
            f"or build fewer ranks at a time (--workers 1); the log is {log_file}"
        )
    said = next((line for line in reversed(last) if line.strip()), "nothing")
    return ToolError(f"{program} failed with exit code {code}; it said last: {said.strip()}; its log is {log_file}")


def _how_to_get(program: str) -> str:
    if program == "docker":
        return "docker is not installed, and --container needs it; install docker and NVIDIA's container toolkit"
    return (
        f"{program} is not on PATH: it comes with TensorRT-LLM 1.2; use --container, which builds in NVIDIA's image, "
        f"or on the GPU machine {extras.install('tensorrt-llm')}"
    )
