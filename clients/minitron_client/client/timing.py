"""When the tokens of one request came, and the metrics that follow from it. Every formula stands here and only here.

All times are whole nanoseconds of one monotonic clock of this process (``time.monotonic_ns``). Token counts are the
server's. A metric that cannot be computed is None (or an empty list), never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Timing:
    """``responses``: for each response, when it was received and how many generated tokens it carried (None: not said).

    ``streamed`` is False where the whole answer came in one response: then there is no first token to time.
    """

    sent_ns: int
    responses: Sequence[tuple[int, int | None]]
    streamed: bool = True

    @property
    def counted(self) -> bool:
        """Whether the server gave a token count with every response."""
        return bool(self.responses) and all(count is not None for _, count in self.responses)

    @property
    def output_tokens(self) -> int | None:
        """Generated tokens, the prompt never among them."""
        return sum(count or 0 for _, count in self.responses) if self.counted else None

    @property
    def ttft_ns(self) -> int | None:
        """Time to first token: first response with at least one generated token - send."""
        token_times = self._token_times()
        return token_times[0][0] - self.sent_ns if token_times else None

    @property
    def itl_ns(self) -> list[float]:
        """Inter-token latency, one value per response after the first: (t[i] - t[i-1]) / tokens in response i."""
        times = self._token_times()
        return [(now - before) / count for (before, _), (now, count) in pairwise(times)]

    @property
    def tpot_ns(self) -> float | None:
        """Time per output token: (last token - first token) / (output tokens - 1); None for fewer than two."""
        times = self._token_times()
        tokens = sum(count for _, count in times)
        return (times[-1][0] - times[0][0]) / (tokens - 1) if tokens > 1 else None

    @property
    def e2e_ns(self) -> int | None:
        """End to end: last response - send."""
        return self.responses[-1][0] - self.sent_ns if self.responses else None

    def _token_times(self) -> list[tuple[int, int]]:
        if not (self.streamed and self.counted):
            return []
        return [(time_ns, count) for time_ns, count in self.responses if count]
