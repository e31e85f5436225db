"""A load from its profile to its result: workers are started, told when to begin, watched, and added up."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from minitron.errors import ClientError, NotReady, OutputExists
from minitron.prometheus import Metrics
from minitron.version import VERSION
from minitron_client.bench.loops import Sendable
from minitron_client.bench.process import SPAWN, lean_grpc, scheduling
from minitron_client.bench.profile import Profile
from minitron_client.bench.record import OK, Record, read_records
from minitron_client.bench.schedule import ScheduleSlice
from minitron_client.bench.summary import Summary, Window, summarize
from minitron_client.bench.watch import GONE, Gone, SaturationWatch, stalls
from minitron_client.bench.worker import LoadWorker, Progress
from minitron_client.client.openai import AnyEndpoint

log = logging.getLogger(__name__)

SCHEMA = 1
RESULT = "run.json"
_LEAD_S = 0.5  # between telling the workers when to start and the start
_DRAIN_S = 10.0  # for workers that were told to stop
_SETTLE_S = 3.0  # for the server to count the last request, which it does after its end

Show = Callable[[float, Progress], None]


@dataclass
class Outcome:
    """What a run left: ``stopped`` is None, ``saturated``, ``interrupted`` or ``server gone`` (then with ``gone``);
    ``samples``: server gauges over time.
    """

    start_ns: int
    last_sent_ns: int
    stopped: str | None
    gone: Gone | None = None
    server_before: Metrics | None = None
    server_after: Metrics | None = None
    samples: list[dict[str, float]] = field(default_factory=list)


def new_run_folder(folder: Path, share: ScheduleSlice) -> None:
    """Make the folder of a run, which several slices may share; raises OutputExists for a slice that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if list(folder.glob(_records_name(share, "*"))):
        raise OutputExists(f"{folder} holds records of slice {share.number}/{share.of} already; give another --output")


def _records_name(share: ScheduleSlice, number: object) -> str:
    return f"requests-{share.number}-of-{share.of}-{number}.jsonl"


def execute(
    profile: Profile, requests: Sequence[Sendable], endpoint: AnyEndpoint, folder: Path, *, model: str,
    share: ScheduleSlice | None = None, metrics_url: str | None = None, show: Show = lambda seconds, progress: None,
) -> dict[str, Any]:  # fmt: skip
    """Send ``requests`` by ``profile`` and return the result document.

    Records are in ``folder`` as they end. ``model`` is the name under which the server counts the requests. An
    interrupt ends the sending and keeps what was measured.
    """
    share = share or ScheduleSlice()
    workers = [
        LoadWorker(
            endpoint, list(requests[number :: profile.workers]),
            ScheduleSlice(number + 1, profile.workers).share(share.share(profile.arrival.concurrency)),
            profile.duration_s, profile.deadline_s, folder / _records_name(share, number + 1),
        )
        for number in range(profile.workers)
    ]  # fmt: skip
    processes = _Workers(workers)
    try:
        outcome = processes.run(profile, metrics_url, model, show)
    finally:
        processes.end()
    window, total, latencies = _window(profile, outcome), Summary(), []
    records = [worker.records for worker in workers]
    for path in records:  # one after the other: a summary holds every value
        one = summarize(read_records(path), window, profile.slo)
        latencies.append(one.document(window)["latency_ms"])
        total.merge(one)
    itl = total.percentiles_ms("itl") or {}
    server = _server_counts(outcome, model, total) | _server_rate(outcome, window, _all(records))
    return _about(profile, share, outcome) | {
        "window": asdict(window), "records": [path.name for path in records], "summary": total.document(window),
        "stalls": stalls(_all(records), itl.get("p99"), outcome.start_ns),
        "workers": latencies,
        "server": {"samples": outcome.samples} | server,
    }  # fmt: skip


def _all(paths: Sequence[Path]) -> Iterator[Record]:
    return (record for path in paths for record in read_records(path))


class _Workers:
    """The worker processes and the pipes to them."""

    def __init__(self, workers: Sequence[LoadWorker]) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        with lean_grpc():
            for worker in workers:
                ours, theirs = SPAWN.Pipe()
                process = SPAWN.Process(target=worker.main, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        for pipe in self._pipes:
            self._expect(pipe, "ready")

    def run(self, profile: Profile, metrics_url: str | None, model: str, show: Show) -> Outcome:
        """Start all at one moment and watch them until they are done."""
        before = Metrics.read(metrics_url) if metrics_url else None
        start_ns = time.monotonic_ns() + round(_LEAD_S * 1e9)
        for pipe in self._pipes:
            pipe.send(start_ns)
        outcome = Outcome(start_ns, start_ns, None, server_before=before)
        watch = SaturationWatch() if profile.stop_when_saturated and profile.arrival.kind != "closed" else None
        busy, in_flight, second = set(self._pipes), dict.fromkeys(self._pipes, 0), Progress()
        next_show, totals = start_ns + 10**9, Progress()
        while busy:
            try:
                for pipe in _readable(busy):
                    kind, said = self._hear(pipe)
                    if kind == "done":
                        busy.discard(pipe)
                        self._done(outcome, busy, *said)
                    else:
                        second.add(said)
                        totals.add(said)
                        in_flight[pipe] = said.in_flight
                if time.monotonic_ns() >= next_show:
                    next_show += 10**9
                    second.in_flight = sum(in_flight.values())
                    seconds = (time.monotonic_ns() - start_ns) / 1e9
                    show(seconds, second)
                    self._sample(outcome, metrics_url, model)
                    if watch and outcome.stopped is None:
                        watch.feed(second.in_flight, second.ttft_ms)
                        if watch.saturated:
                            self._stop(outcome, "saturated", busy)
                    second = Progress()
            except KeyboardInterrupt:
                if outcome.stopped:
                    raise
                self._stop(outcome, "interrupted", busy)
        if outcome.stopped != GONE:
            outcome.gone = None
        if metrics_url and before:
            outcome.server_after = _settled(metrics_url, before, model, totals)
        return outcome

    def end(self) -> None:
        """Leave no process behind."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it is gone
                pipe.send("end")
        for process in self._processes:
            process.join(timeout=_DRAIN_S if process.exitcode is None else 0)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()

    def _done(
        self, outcome: Outcome, busy: set[Connection], last_sent_ns: int, suspected: Gone | None, sure: bool
    ) -> None:
        """A worker has ended; the first that is sure that the server is gone ends the others, which saw it as well."""
        outcome.last_sent_ns = max(outcome.last_sent_ns, last_sent_ns)
        if sure and outcome.stopped is None:
            self._stop(outcome, GONE, busy)
        if suspected and (outcome.gone is None or suspected.since_ns < outcome.gone.since_ns):
            outcome.gone = suspected

    def _stop(self, outcome: Outcome, reason: str, busy: set[Connection]) -> None:
        outcome.stopped = reason
        log.info("%s: sending has stopped, what was measured is kept", reason)
        for pipe in busy:
            pipe.send("stop")

    def _sample(self, outcome: Outcome, url: str | None, model: str) -> None:
        if url is None:
            return
        with contextlib.suppress(NotReady):  # a server that dies in the run is seen in the records
            asked_ns = time.monotonic_ns()
            page = Metrics.read(url, timeout_s=0.5)
            middle_ns = (asked_ns + time.monotonic_ns()) // 2  # the server wrote it somewhere in between
            name = "nv_trt_llm_request_metrics"
            found = {
                "active": page.sum(name, request_type="active"), "waiting": page.sum(name, request_type="waiting"),
                "kv_fraction": page.sum("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="fraction"),
                "requests": page.sum("nv_inference_request_success", model=model),
            }  # fmt: skip
            seconds = (middle_ns - outcome.start_ns) / 1e9
            outcome.samples.append(
                {"at_s": seconds} | {key: value for key, value in found.items() if value is not None}
            )

    def _expect(self, pipe: Connection, kind: str) -> Any:
        while True:
            heard, said = self._hear(pipe)
            if heard == kind:
                return said

    def _hear(self, pipe: Connection) -> tuple[str, Any]:
        try:
            kind, said = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise ClientError(
                "a sending process ended unexpectedly; its records so far are in the run's folder"
            ) from None
        return str(kind), said


def _readable(pipes: set[Connection]) -> list[Connection]:
    return [pipe for pipe in wait(list(pipes), timeout=0.2) if isinstance(pipe, Connection)]


def _settled(url: str, before: Metrics, model: str, totals: Progress) -> Metrics | None:
    """The metrics once the server has counted what we have, or does so no more; None where it is gone."""
    until = time.monotonic() + _SETTLE_S
    with contextlib.suppress(NotReady):
        while True:
            page = Metrics.read(url)
            counts = _counts(before, page, model, totals.sent, totals.tokens).values()
            if time.monotonic() > until or all(theirs is None or theirs >= ours for theirs, ours in counts):
                return page
            time.sleep(0.1)
    return None


def _counts(before: Metrics, after: Metrics, model: str, sent: int, tokens: int) -> dict[str, tuple[float | None, int]]:
    """What the server counted between two readings (None: it does not), and what we did."""
    well = after.gained(before, "nv_inference_request_success", model=model)
    otherwise = after.gained(before, "nv_inference_request_failure", model=model) or 0.0
    return {
        "requests": (None if well is None else well + otherwise, sent),
        "output_tokens": (after.gained(before, "nv_llm_output_token_len_sum"), tokens),
    }


def _window(profile: Profile, outcome: Outcome) -> Window:
    """From the end of the warm-up to the end of sending, or of the server: what comes afterwards lies outside."""
    start = outcome.start_ns + round(profile.warm_up_s * 1e9)
    planned_end = outcome.start_ns + round(profile.duration_s * 1e9)
    early = profile.arrival.kind == "closed" or outcome.stopped
    end = min(outcome.last_sent_ns + 1, planned_end) if early else planned_end
    end = min(end, outcome.gone.since_ns) if outcome.gone else end
    return Window(min(start, end), end)


def _about(profile: Profile, share: ScheduleSlice, outcome: Outcome) -> dict[str, Any]:
    return {
        "kind": "load", "schema": SCHEMA, "toolkit": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform(),
                    "scheduling": scheduling()},
        "profile": profile.model_dump(mode="json"), "slice": asdict(share), "stopped": outcome.stopped,
        "server_gone": outcome.gone.document(outcome.start_ns) if outcome.gone else None, "start_ns": outcome.start_ns,
    }  # fmt: skip


def _server_counts(outcome: Outcome, model: str, total: Summary) -> dict[str, Any]:
    """The server's own counts of the run, and by which share ours differ; what it does not count is absent."""
    before, after = outcome.server_before, outcome.server_after
    if before is None or after is None:
        return {}
    found: dict[str, Any] = {}
    for name, (theirs, ours) in _counts(before, after, model, total.sent, total.all_tokens).items():
        if theirs:
            found[name] = theirs
            found[f"{name}_difference"] = (ours - theirs) / theirs
    return found


def _server_rate(outcome: Outcome, window: Window, records: Iterable[Record]) -> dict[str, float]:
    """Requests/s by the server, from the first to the last sample inside the window, and by which share ours differ.

    Absent where the server was not asked twice in the window, or has no such count.
    """
    counted = [
        (time_ns, sample["requests"])
        for sample in outcome.samples
        if "requests" in sample and window.holds(time_ns := outcome.start_ns + round(sample["at_s"] * 1e9))
    ]
    if len(counted) < 2 or counted[-1][1] <= counted[0][1]:
        return {}
    (start_ns, before), (end_ns, after) = counted[0], counted[-1]
    ours = sum(record.outcome == OK and start_ns < record.ended_ns <= end_ns for record in records)
    theirs = after - before
    return {"requests_per_s": theirs / (end_ns - start_ns) * 1e9, "requests_per_s_difference": (ours - theirs) / theirs}
