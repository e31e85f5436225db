"""A process of its own that measures, started as the load generator starts those that send."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, Protocol, TypeVar

from minitron_client.bench.process import SPAWN, lean_grpc

P = ParamSpec("P")
T = TypeVar("T")


class Call(Protocol):
    """Calls a function of a module with arguments that can be sent, and returns what it returns."""

    def __call__(self, function: Callable[P, T], *words: P.args, **named: P.kwargs) -> T: ...


@contextlib.contextmanager
def sender() -> Iterator[Call]:
    """The process, until the end of the block."""
    with lean_grpc(), ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        yield lambda function, *words, **named: pool.submit(function, *words, **named).result()
