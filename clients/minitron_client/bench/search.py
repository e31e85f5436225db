"""The highest rate that a server carries: doubled until it breaks, halved in on, and repeated at the knee.

A rate is carried when at least a given share of its requests is good (met the SLO, without an error). The result is
the highest rate that was carried in every repeat.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron.console import table
from minitron.errors import UsageError, VerdictError
from minitron_client.bench import watch
from minitron_client.bench.profile import Profile, Slo
from minitron_client.bench.statistics import mean, remark, shown

log = logging.getLogger(__name__)

Measure = Callable[[Profile, Path], dict[str, Any]]

_CLOSE = 1.1  # the search ends when the carried and the broken rate are within 10 %
_MOST_DOUBLINGS = 16
_FEWEST_REQUESTS = 8  # a run of fewer says nothing
_REPEATS = 3


def find_capacity(profile: Profile, measure: Measure, folder: Path, bound: float) -> dict[str, Any]:
    """Search from the profile's rate on; every run has a folder of its own below ``folder``.

    Raises VerdictError; ServerError where the server is gone.
    """
    if profile.slo == Slo():
        raise UsageError("--capacity needs an SLO; give one with --set slo.ttft_ms=500 or in the profile")
    tried: list[dict[str, Any]] = []

    def carried(rate: float) -> bool:
        changed = profile.model_copy(update={"arrival": profile.arrival.model_copy(update={"rate": rate})})
        document = measure(changed, folder / f"{len(tried):02d}-rate-{rate:.4g}")
        if document["stopped"] == "interrupted":
            raise KeyboardInterrupt
        if document["stopped"] == watch.GONE:
            raise watch.failure(document["server_gone"])
        summary = document["summary"]
        good = (summary["goodput_share"] or 0.0) >= bound and document["stopped"] is None
        tried.append({"rate": rate, "carried": good, "stopped": document["stopped"], "summary": summary})
        log.info("%.4g requests/s: %.1f %% good, %s", rate, 100 * (summary["goodput_share"] or 0), _word(good))
        return good

    low, high = _bracket(profile.arrival.rate, carried, lowest=_FEWEST_REQUESTS / profile.duration_s)
    while high / low > _CLOSE:
        middle = (low * high) ** 0.5
        if carried(middle):
            low = middle
        else:
            high = middle
    knee, repeats = _repeat(low, carried, tried)
    rates = [one["summary"]["requests_per_s"] for one in repeats]
    interval = mean(rates)
    return {
        "kind": "capacity", "schema": 1, "profile": profile.model_dump(mode="json"), "goodput_bound": bound,
        "capacity_per_s": knee, "measured_per_s": vars(interval) if interval else None, "runs": tried,
    }  # fmt: skip


def _bracket(rate: float, carried: Callable[[float], bool], lowest: float) -> tuple[float, float]:
    """A rate that is carried and a higher one, at most twice it, that is not."""
    if carried(rate):
        for _ in range(_MOST_DOUBLINGS):
            if not carried(rate * 2):
                return rate, rate * 2
            rate *= 2
        raise VerdictError(f"the server carried every rate up to {rate:.4g} requests/s; start higher or send from more")
    while rate / 2 >= lowest:
        if carried(rate / 2):
            return rate / 2, rate
        rate /= 2
    raise VerdictError(f"the server carried no rate down to {rate:.4g} requests/s; check the SLO")


def _repeat(
    rate: float, carried: Callable[[float], bool], tried: list[dict[str, Any]]
) -> tuple[float, list[dict[str, Any]]]:
    """The highest rate from ``rate`` down, in steps of a tenth, that is carried every time, and its runs."""
    while True:
        begin = len(tried)
        if all(carried(rate) for _ in range(_REPEATS)):
            return rate, tried[begin:]
        rate /= _CLOSE


def _word(good: bool) -> str:
    return "carried" if good else "not carried"


def text(document: dict[str, Any]) -> str:
    """The result for people."""
    rows = []
    for one in sorted(document["runs"], key=lambda run: float(run["rate"])):
        summary = one["summary"]
        ttft = summary["latency_ms"].get("ttft_intended", {})
        rows.append([
            f"{one['rate']:.3g}", f"{summary['requests_per_s'] or 0:.3g}",
            f"{summary.get('output_tokens_per_s', 0):.1f}",
            f"{100 * (summary['goodput_share'] or 0):.1f}%",
            *(shown(ttft.get(share), ".1f") for share in ("p50", "p99")), one["stopped"] or _word(one["carried"]),
        ])  # fmt: skip
    columns = ["rate", "requests/s", "tokens/s", "good", "TTFT p50 ms", "TTFT p99 ms", "verdict"]
    found = (
        f"capacity: {document['capacity_per_s']:.3g} requests/s with at least {document['goodput_bound']:.0%} good, "
        f"{_REPEATS} of {_REPEATS} repeats"
    )
    return "\n".join([table(rows, columns), *remark(rows), found])
