"""Every error a user can meet, in one tree, with its exit code.

::

    MinitronError                    1   a failure that has no better name
    ├── UsageError                   2   an argument, or a combination of arguments, that cannot be
    ├── InputError                   3   what was given to read is missing, broken or of another kind
    │   ├── ModelError               3     a source model (Hugging Face folder or GGUF file)
    │   ├── CheckpointError          3     a TensorRT-LLM checkpoint
    │   ├── EngineError              3     an engine folder
    │   └── RepositoryError          3     a Triton model repository
    ├── OutputError                  4   the result cannot be written
    │   ├── OutputExists             4     it is there already and --force was not given
    │   └── NoSpace                  4     the disk is full or would be
    ├── MachineError                 5   this machine lacks something that the command needs
    │   ├── MissingDependency        5     a package, a program, a shared library
    │   ├── NotEnoughMemory          5     what was asked for does not fit
    │   └── PortBusy                 5     another process listens there
    ├── ToolError                    6   a program that we ran (trtllm-build, docker) failed
    ├── ServerError                  7   the server did not start, or died
    │   └── NotDrained              16   it had streams left when its time to end them was over, and was killed
    ├── VerdictError                 8   a limit that the user set was not met
    │   └── Undecided               17   whether it was met cannot be told by what was measured
    └── ClientError                  9   a request failed
        ├── NotReady                10     no server there, or its model is not ready
        ├── Rejected                11     the server is full
        ├── InvalidRequest          12     the server or the client found the request wrong
        ├── DeadlineExceeded        13     no answer within the time the caller gave
        ├── StreamBroken            14     the connection ended in the middle of an answer
        └── Cancelled               15     somebody cancelled the request

An interrupt (Ctrl-C) exits with 130, a bug of ours with 70 (and one line, unless --debug).

A message says what is wrong, where, and what to do about it, in one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_BUG = 70
EXIT_INTERRUPTED = 130


class MinitronError(Exception):
    """Base of all errors that the toolkit raises on purpose."""

    exit_code = 1


class UsageError(MinitronError):
    """An argument, or a combination of arguments, that cannot be."""

    exit_code = 2


class InputError(MinitronError):
    """What was given to read is missing, broken or of another kind."""

    exit_code = 3


class ModelError(InputError):
    """A source model that cannot be used."""


class CheckpointError(InputError):
    """A TensorRT-LLM checkpoint that cannot be used."""


class EngineError(InputError):
    """An engine folder that cannot be used."""


class RepositoryError(InputError):
    """A Triton model repository that cannot be used."""


class OutputError(MinitronError):
    """The result cannot be written."""

    exit_code = 4


class OutputExists(OutputError):
    """The output is there already and --force was not given."""


class NoSpace(OutputError):
    """The disk is full, or would be before the work is done."""


class MachineError(MinitronError):
    """This machine lacks something that the command needs."""

    exit_code = 5


class MissingDependency(MachineError):
    """A package, a program or a shared library is not here."""


class NotEnoughMemory(MachineError):
    """What was asked for does not fit into this machine's memory."""


class PortBusy(MachineError):
    """Another process listens on the port."""


class ToolError(MinitronError):
    """A program that the toolkit ran failed."""

    exit_code = 6


class ServerError(MinitronError):
    """The server did not start, or died."""

    exit_code = 7


class NotDrained(ServerError):
    """The server had streams left when its time to end them was over, and was killed."""

    exit_code = 16


class VerdictError(MinitronError):
    """A limit that the user set was not met."""

    exit_code = 8


class Undecided(VerdictError):
    """Whether a limit was met cannot be told by what was measured."""

    exit_code = 17


class ClientError(MinitronError):
    """A request failed."""

    exit_code = 9


class NotReady(ClientError):
    """No server answers there, or its model is not ready."""

    exit_code = 10


class Rejected(ClientError):
    """The server is full; trying again later is safe."""

    exit_code = 11


class InvalidRequest(ClientError):
    """The request itself is wrong; trying again will not help."""

    exit_code = 12


class DeadlineExceeded(ClientError):
    """No complete answer within the time that the caller gave."""

    exit_code = 13


class StreamBroken(ClientError):
    """The connection ended in the middle of an answer."""

    exit_code = 14


class Cancelled(ClientError):
    """Somebody cancelled the request."""

    exit_code = 15


@contextmanager
def values_as_input() -> Iterator[None]:
    """What ``minitron.text`` calls a ValueError, since it knows none of these errors, is an InputError to a user."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error
