"""The command line: exit codes as drawn in ``errors``, one line an error, no traceback without --debug."""

from __future__ import annotations

import argparse
import errno
import inspect
import re
import sys
import types
from collections.abc import Callable

import pytest

from conftest import minitron
from minitron import errors
from minitron_cli import main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """``command(body)`` puts a subcommand ``inspect`` in place that runs ``body``."""

    def put(body: Callable[[], int]) -> None:
        module = types.ModuleType("minitron_cli.commands.inspect")
        module.configure = lambda parser: None  # type: ignore[attr-defined]
        module.run = lambda args: body()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "minitron_cli.commands.inspect", module)

    return put


def raising(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ModelError("what\nwhere"), 3),
        (errors.OutputExists("there"), 4),
        (errors.PortBusy("8001"), 5),
        (errors.Rejected("full"), 11),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 4),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 4),
        (ModuleNotFoundError("no", name="openvino"), 5),
        (ZeroDivisionError("bug"), 70),
    ],
)
def test_an_error_is_one_line_and_a_code(
    command: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    command(raising(error))
    assert main.main(["inspect"]) == code
    err = capsys.readouterr().err
    assert err.startswith("minitron: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_debug_shows_where(command: Callable[[Callable[[], int]], None]) -> None:
    command(raising(errors.ModelError("x")))
    for words in (["--debug", "inspect"], ["inspect", "--debug"]):
        with pytest.raises(errors.ModelError):
            main.main(words)


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+) +(\d+) ", str(errors.__doc__)))
    real = {
        name: str(kind.exit_code)
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.MinitronError) and kind is not errors.MinitronError
    }
    assert drawn == real


def test_unknown_command_is_a_usage_error() -> None:
    done = minitron("conver", check=False)
    assert done.returncode == errors.UsageError.exit_code
    assert done.stderr.startswith("minitron: error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", sorted(main.RENAMED))
def test_a_command_that_was_names_what_does_it_now(name: str) -> None:
    done = minitron(name, "--any", "thing", check=False)
    assert done.returncode == errors.UsageError.exit_code and done.stdout == ""
    assert done.stderr.startswith(f"minitron: error: 'minitron {name}' is ") and done.stderr.count("\n") == 1
    now = set(re.findall(r"'minitron (\w+)", done.stderr)) - {name}
    assert now and now <= set(main.COMMANDS) and name not in main.COMMANDS


@pytest.mark.parametrize("name", sorted(main.COMMANDS))
def test_every_command_has_a_module(name: str) -> None:
    assert isinstance(main.parser_of(name), argparse.ArgumentParser)
    assert f"minitron {name}" in minitron(name, "--help").stdout
