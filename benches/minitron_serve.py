"""``minitron serve`` as a child process on free ports, as the benches need it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import source_tree


@contextmanager
def minitron_serve(
    repository: Path,
    work: Path,
    tree: Path = source_tree.ROOT,
    *,
    while_loading: Callable[[int], AbstractContextManager[None]] = lambda pid: nullcontext(),
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process and its state document (``urls``) once the server is ready; its state and log go into ``work``.

    ``tree``: the source tree whose server it is. ``while_loading``: entered with the pid until it is ready.
    """
    words = ["serve", repository, "--json", "--state", work / "state"]
    words += ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    log = work / "server.log"
    with source_tree.running(tree, *words, log=log) as process:
        with while_loading(process.pid):
            state = source_tree.document(process, log)
        yield process, state
