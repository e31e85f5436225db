"""Ending a server in good order: no new requests, the streams in flight to their end, and then at once.

Triton's own end would do for the streams, but not for the rest: it waits for every HTTP connection to close, idle ones
too, and takes gRPC requests meanwhile; it ends the instances of a Python model one after the other, a second or more
each; and what hangs in that hangs. So the models are unloaded through Triton's own API, which leaves each to the
requests that it has. That no request holds a model any more is an event: the threads of its instances end and say so in
the verbose log (an ensemble has none, and is unloaded on the spot). After the last of these events nothing is left
that is worth waiting for, and the processes are ended, whatever their unloading still does.

First the models that ask others (the text model, the ensemble), then those they ask: what was accepted finds its way,
and what a client leaves meanwhile is stopped there.

Triton 2.51 may keep a request for ever whose client cancelled while its last response was written: in the verbose log
it is "Waiting for the callback to retrieve cancellation". So what neither the text model nor the engine counts any more
is not waited for either.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable

from minitron.errors import NotDrained, NotReady, ServerError
from minitron.prometheus import Metrics
from minitron_triton.server import leftovers
from minitron_triton.server.control import Control, Refused
from minitron_triton.server.launch import GRACE_S, Served
from minitron_triton.server.running import Running, ending

log = logging.getLogger(__name__)

_POLL_S = 0.02
_COUNT_S = 0.25  # between two looks at what the models count
# So long nothing is counted of requests that Triton holds. Their answers are in the network by then, save what is
# beyond gRPC's window (64 kB and more) for a client that has not read all that time.
_NOTHING_S = 1.5
_ENGINE_WORKS_ON = ("active", "scheduled", "waiting", "context", "generation")
# A token through the ensemble makes up to 6 kB of verbose log. After so much of it the log is kept short again; the
# models' ends are known later then, from their unloading, which takes a second for each instance.
_VERBOSE_BYTES = 64 << 20
_FLUSH_S = 1.0  # at most, until the last bytes are on their way
_FLUSH_UNSEEN_S = 0.3  # where the server's threads cannot be seen, as it may be in a container


class Drain:
    """One drain of a server; ``run`` does it all."""

    def __init__(
        self, running: Running, served: Served, control: Control, exit_timeout_s: int, look: Callable[[], bool],
        *, metrics: str,
    ) -> None:  # fmt: skip
        """``look`` is called over and over: it reads the server's log on and says whether to end at once.

        ``metrics``: where the server's metrics are, host:port.
        """
        self._running, self._served, self._control, self._look = running, served, control, look
        self._metrics, self._is_left = metrics, False
        self._next_count = self._counted = time.monotonic()  # when to look, and when something was counted last
        self._log = running.log
        self._exit_timeout_s = exit_timeout_s
        self._deadline = time.monotonic() + exit_timeout_s + GRACE_S
        self._verbose_until: int | None = None

    def run(self) -> bool:
        """Return whether all streams ended; False: cut off as ``look`` asked. What runs then is to be killed.

        Raises ServerError for a server that died, NotDrained for one whose time was over.
        """
        whole = self._by_models() and self._wait_for(self._served.models)
        if whole:
            self._flush()
        return whole

    def _by_models(self) -> bool:
        """Take the models from the server, those that ask others first; False when cut off."""
        try:
            self._control.log_verbosely(verbose=True)
            self._verbose_until = self._log.offset + _VERBOSE_BYTES
            for model in self._served.fronts:
                self._control.unload(model)
            if not self._wait_for(self._served.fronts):
                return False
            for model in set(self._served.models) - set(self._served.fronts):
                self._control.unload(model)
        except Refused as refused:
            log.debug("the server cannot be drained model by model (%s); it gets SIGTERM", refused)
            self._verbose_until = None
            self._running.child.terminate()
        return True

    def _wait_for(self, models: Iterable[str]) -> bool:
        """Wait until no request holds one of the models, or the server ends in good order; False when cut off."""
        child = self._running.child
        while not self._log.ended.issuperset(models):
            gone, lost = child.poll(), self._lost()
            if self._look():
                return False
            if gone == 0 or self._counts_nothing():
                return True
            if not self._log.ended.issuperset(models):
                if gone is not None:
                    raise self._death(ending(gone))
                if lost and not self._log.ended.issuperset(lost):
                    raise self._death(f"the process of {', '.join(lost)} ended")
            if time.monotonic() > self._deadline:
                raise NotDrained(
                    f"streams were left after the exit timeout of {self._exit_timeout_s} s, and the server was killed "
                    f"(log: {self._log.path})"
                )
            if self._verbose_until is not None and self._log.offset > self._verbose_until:
                self._verbose_until = None
                with contextlib.suppress(Refused):
                    self._control.log_verbosely(verbose=False)
            time.sleep(_POLL_S)
        return True

    def _counts_nothing(self) -> bool:
        """Whether no model has counted a request for a while; False where they do not tell."""
        now = time.monotonic()
        if now >= self._next_count:
            self._next_count = now + _COUNT_S
            if _in_work(self._metrics) != 0:
                self._counted = time.monotonic()
        if now - self._counted < _NOTHING_S:
            return False
        if not self._is_left:
            log.warning("Triton holds requests that no model works on, as those of clients that left; it is ended")
            self._is_left = True
        return True

    def _lost(self) -> list[str]:
        """Models that lost a process; where their ends are not logged in time, that may be their end."""
        if self._verbose_until is None:
            return []
        return [instance.rsplit("_", 2)[0] for instance in self._running.lost()]

    def _death(self, how: str) -> ServerError:
        return ServerError(
            f"the server died while it drained ({how}): {self._log.last_words()} (log: {self._log.path})"
        )

    def _flush(self) -> None:
        """Wait until Triton has written the last answers: until none of its threads has anything to do."""
        until, quiet = time.monotonic() + _FLUSH_S, 0
        while self._running.child.poll() is None and quiet < 2 and time.monotonic() < until:
            time.sleep(_POLL_S)
            at_work = leftovers.at_work(self._running.mark)
            if at_work is None:
                time.sleep(_FLUSH_UNSEEN_S)
                return
            quiet = 0 if at_work else quiet + 1


def _in_work(url: str) -> float | None:
    """Requests that text model and engine count; None where one of them does not say."""
    try:
        metrics = Metrics.read(url, timeout_s=1.0)  # a server that hangs must not hold up its own end
    except NotReady:
        return None
    text = metrics.sum("minitron_text_requests")
    engine = [metrics.sum("nv_trt_llm_request_metrics", request_type=kind) for kind in _ENGINE_WORKS_ON]
    told = [count for count in engine if count is not None]
    return text + sum(told) if text is not None and told else None
