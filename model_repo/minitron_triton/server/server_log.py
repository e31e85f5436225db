"""What tritonserver and the models wrote, read while it grows, and what it says about loading, ending and failing.

Wordings are those of tritonserver 2.51.0; those of 2.73 are the same.
"""

from __future__ import annotations

import re
from pathlib import Path

from minitron.errors import MinitronError, PortBusy, ServerError

# With --log-format=ISO8601 a line is: time, level, process, file:line], "text" with its line ends written as \n.
_ERROR = re.compile(r"^\S+Z E \d+ \S+\] \"?(?P<text>.*?)\"?$")
_PROTOBUF = re.compile(r"^\[libprotobuf ERROR \S+\] (?P<text>.*)$")
# Of the server itself: a line of the log, or of the tables in it, and the one that it ends with.
_OWN_WORDS = re.compile(r"^(\S+Z [IWE] \d+ |[+|]|$|error: )")
_TRACEBACK = r"\n\nAt:\n"  # how the Python backend begins the traceback in its message
_LOADED = re.compile(r"successfully loaded '([^']+)'")
_NOT_LOADED = re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)")
# Said (verbosely) by the thread of an instance, once no request holds the model any more; an ensemble has no instance.
_INSTANCE_ENDED = re.compile(r'"Stopping backend thread for (\S+)_\d+_\d+\.\.\."')
_UNLOADED = re.compile(r"successfully unloaded '([^']+)'")
_PROCESS_ENDED = "is not healthy"
_STRUCK = re.compile(r"^Signal \((?P<number>\d+)\) received\.")
_STUB_ENDED = re.compile(r"Failed to preinitialize Python stub: (?P<reason>.*)")
_PORT_IN_USE = re.compile(r"Socket '(?P<address>[^']+)' already in use")
# Said before and after 400 lines about all flags; the values are left out, as they may be secret.
_UNKNOWN_FLAG = re.compile(r"tritonserver: (?P<what>(?:unrecognized )?option '--[^'=]*)[^']*(?P<rest>'.*)")
_BAD_VALUE = re.compile(r'^Bad option: "(?P<flag>--[^"=]*)')
# Both are printed on machines without a GPU.
_HARMLESS = ("CudaDriverHelper has not been initialized", "CUDA driver version is insufficient")
_TAIL_LINES = 200


class ServerLog:
    """A log file that another process appends to, from ``offset`` (bytes) on.

    ``loaded``: models that are; ``ended``: models that no request holds any more, once they are unloaded; ``struck``:
    the signal by which tritonserver says that it ends; ``refused``: the flag that it does not take.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset
        self.tail: list[str] = []
        self.loaded: set[str] = set()
        self.ended: set[str] = set()
        self.struck: int | None = None
        self.refused: str | None = None

    def new_errors(self) -> list[str]:
        """Read on, and return what the server reported as errors since the last call."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            piece = file.read()
        whole = piece[: piece.rfind(b"\n") + 1]
        self.offset += len(whole)
        lines = whole.decode("utf-8", "replace").splitlines()
        self.tail = (self.tail + lines)[-_TAIL_LINES:]
        for line in lines:
            self._note(line)
        return [text for line in lines if (text := _error_text(line))]

    def _note(self, line: str) -> None:
        for seen, pattern in ((self.loaded, _LOADED), (self.ended, _INSTANCE_ENDED), (self.ended, _UNLOADED)):
            if match := pattern.search(line):
                seen.add(match[1])
        if match := _STRUCK.match(line):
            self.struck = self.struck or int(match["number"])
        if match := _UNKNOWN_FLAG.search(line):
            self.refused = match["what"] + match["rest"]
        elif match := _BAD_VALUE.match(line):
            self.refused = f"a bad value for {match['flag']}"

    def check_loading(self) -> None:
        """Raise what ``explain`` finds as soon as one model has failed: tritonserver may wait for the others."""
        for line in self.tail:
            if match := _STUB_ENDED.search(line):  # tritonserver itself does not notice, and waits for ever
                raise ServerError(f"a model did not start: {match['reason']}; render the repository again")
            if _NOT_LOADED.search(line):
                raise self.explain("tritonserver cannot become ready")

    def explain(self, what: str) -> MinitronError:
        """Why ``what`` came to be before the server was ready, as far as the log tells."""
        for line in self.tail:
            if match := _PORT_IN_USE.search(line):
                return PortBusy(f"{match['address']} is taken; stop what listens there, or choose another port")
        if self.refused:
            return ServerError(f"{what}: {self.refused} (log: {self.path})")
        texts = [text for line in self.tail if (text := _error_text(line))]
        texts = texts or [line for line in self.tail if line.startswith("error: ")]
        reasons = [f"model {m['model']}: {m['reason']}" for text in texts if (m := _NOT_LOADED.search(text))] or texts
        said = "; ".join(dict.fromkeys(reasons))[:600] or self.last_words()
        if _PROCESS_ENDED in said:
            said += f" Its process ended; what was said last: {self.last_words()}"
        return ServerError(f"{what}: {said} (log: {self.path})")

    def last_words(self) -> str:
        """What was said last by no part of the server's own log: by a process that died, by a library."""
        words = [line.strip() for line in self.tail if not _OWN_WORDS.match(line)]
        return "; ".join(words[-3:])[-600:] or "it said nothing"


def _error_text(line: str) -> str | None:
    match = _ERROR.match(line) or _PROTOBUF.match(line)
    if match is None or any(text in line for text in _HARMLESS):
        return None
    return match["text"].partition(_TRACEBACK)[0].replace(r"\n", " ")
