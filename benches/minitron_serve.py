"""``minitron serve`` as a child process on free ports, as the benches need it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def minitron_serve(repository: Path, work: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process and its state document (``urls``) once the server is ready; its state and log go into ``work``."""
    words = [sys.executable, "-m", "minitron_cli", "serve", repository, "--json", "--state", work / "state"]
    words += ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    log_file = work / "server.log"
    with log_file.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            text = ""
            while not text.endswith("}\n"):
                line = process.stdout.readline()
                assert line, f"the server did not start:\n{log_file.read_text(encoding='utf-8')[-2000:]}"
                text += line
            yield process, json.loads(text)
        finally:
            process.terminate()
            process.wait()
