"""Running a program that a model wrote: in bubblewrap or a container without network, files or much of the machine."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path

from minitron.errors import MissingDependency

#: Of a container; its tests need the standard library alone.
IMAGE = "python:3.12-slim"
_SECONDS = 20
#: Before the program: its own limits of memory (1 GB), processor time and size of files.
_LIMITS = """\
import resource, sys
for limit, most in ((resource.RLIMIT_AS, 1 << 30), (resource.RLIMIT_CPU, 10), (resource.RLIMIT_FSIZE, 1 << 20)):
    resource.setrlimit(limit, (most, most))
exec(compile(sys.stdin.read(), "program", "exec"), {"__name__": "__main__"})
sys.exit(77)
"""
_PASSED = 77  # reached alone by a program that came to its end, tests and all; one that leaves early ends with another


def passes(program: str) -> bool:
    """Whether a Python program, given as text, ends without an error, in the time that it has."""
    command = [*sandbox(), "-I", "-c", _LIMITS]
    try:
        done = subprocess.run(command, input=program, text=True, timeout=_SECONDS, check=False,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == _PASSED


@functools.cache
def sandbox() -> tuple[str, ...]:
    """The command that Python's arguments follow. Raises MissingDependency where neither kind works here."""
    for command in (_bubblewrap(), _container()):
        if command and _works(command):
            return command
    raise MissingDependency(
        "generated code runs in bubblewrap (Debian's package bubblewrap, with user namespaces allowed) or in docker "
        f"(with the image {IMAGE}), and neither works here"
    )


def _works(command: tuple[str, ...]) -> bool:
    done = subprocess.run([*command, "-I", "-c", "print(6 * 7)"], capture_output=True, text=True, check=False)
    return done.stdout == "42\n"


def _bubblewrap() -> tuple[str, ...]:
    program = shutil.which("bwrap")
    if program is None:
        return ()
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    shown = [path for path in ("/usr", "/lib", "/lib64", "/bin", sys.base_prefix) if Path(path).exists()]
    binds = [word for path in dict.fromkeys(shown) for word in ("--ro-bind", path, path)]
    return (program, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", *binds, "--proc", "/proc",
            "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp", str(python))  # fmt: skip


def _container() -> tuple[str, ...]:
    program = shutil.which("docker") or shutil.which("podman")
    if program is None:
        return ()
    return (program, "run", "--rm", "--interactive", "--pull", "never", "--network", "none", "--read-only", "--tmpfs",
            "/tmp", "--workdir", "/tmp", "--memory", "1g", "--pids-limit", "64", "--cap-drop", "ALL", "--security-opt",
            "no-new-privileges", "--user", "65534", IMAGE, "python")  # fmt: skip
