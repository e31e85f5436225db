"""What tritonserver and the models wrote, read while it grows, and what it says about a failure.

Wordings are those of tritonserver 2.51.0.
"""

from __future__ import annotations

import re
from pathlib import Path

from minitron_trtllm.errors import MinitronError, PortBusy, ServerError

# With --log-format=ISO8601 a line is: time, level, process, file:line], "text" with its line ends written as \n.
_ERROR = re.compile(r"^\S+Z E \d+ \S+\] \"?(?P<text>.*?)\"?$")
_PROTOBUF = re.compile(r"^\[libprotobuf ERROR \S+\] (?P<text>.*)$")
_TRACEBACK = r"\n\nAt:\n"  # how the Python backend begins the traceback in its message
_LOADED = re.compile(r"successfully loaded '([^']+)'")
_NOT_LOADED = re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)")
# tritonserver 2.51.0 does not notice this and waits for ever.
_STUB_ENDED = re.compile(r"Failed to preinitialize Python stub: (?P<reason>.*)")
_PORT_IN_USE = re.compile(r"Socket '(?P<address>[^']+)' already in use")
# Both are printed on machines without a GPU.
_HARMLESS = ("CudaDriverHelper has not been initialized", "CUDA driver version is insufficient")
_TAIL_LINES = 200


class ServerLog:
    """A log file that another process appends to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tail: list[str] = []
        self.loaded: set[str] = set()
        self._offset = 0

    def new_errors(self) -> list[str]:
        """Read on, and return what the server reported as errors since the last call."""
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            piece = file.read()
        whole = piece[: piece.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.decode("utf-8", "replace").splitlines()
        self.tail = (self.tail + lines)[-_TAIL_LINES:]
        self.loaded.update(match[1] for line in lines if (match := _LOADED.search(line)))
        return [text for line in lines if (text := _error_text(line))]

    def check_stubs(self) -> None:
        """Raise ServerError where a model's process ended before it began."""
        for line in self.tail:
            if match := _STUB_ENDED.search(line):
                raise ServerError(f"a model did not start: {match['reason']}; render the repository again")

    def explain(self, code: int) -> MinitronError:
        """Why the server ended with ``code`` before it was ready, as far as the log tells."""
        for line in self.tail:
            if match := _PORT_IN_USE.search(line):
                return PortBusy(f"{match['address']} is taken; stop what listens there, or choose another port")
        texts = [text for line in self.tail if (text := _error_text(line))]
        reasons = [f"model {m['model']}: {m['reason']}" for text in texts if (m := _NOT_LOADED.search(text))] or texts
        last_line = next((line for line in reversed(self.tail) if line.strip()), "it said nothing")
        said = "; ".join(dict.fromkeys(reasons))[:600] or last_line
        return ServerError(f"tritonserver ended with {code} before it was ready: {said} (log: {self.path})")


def _error_text(line: str) -> str | None:
    match = _ERROR.match(line) or _PROTOBUF.match(line)
    if match is None or any(text in line for text in _HARMLESS):
        return None
    return match["text"].partition(_TRACEBACK)[0].replace(r"\n", " ")
