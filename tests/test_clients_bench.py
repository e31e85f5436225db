"""What ``make bench-client`` measures with: schedules, the two servers that keep them, the rule that discards runs.

Expected values: schedules worked out by hand, gRPC's own client for the wire, the rule as the benchmark states it.
"""

from __future__ import annotations

import asyncio
import struct
from itertools import pairwise

import known_servers
import pytest
import timing_error
from bars import Bar, exit_code
from timetable import Schedule, Timetable
from timing_error import AT_64, Run, judge, request, until_enough

from minitron_client.bench.record import OK, Record
from minitron_client.bench.sender import GrpcSender
from minitron_client.client.endpoint import Endpoint

MS = 10**6


def test_streams_are_spread_evenly_over_the_interval() -> None:
    schedules = Schedule.spread(10 * MS, 4)
    assert [one.after(1_000 * MS + 1) - 1_000 * MS for one in schedules] == [10 * MS, 2.5 * MS, 5 * MS, 7.5 * MS]
    assert [Schedule.of_prompt(one.prompt()) for one in schedules] == schedules
    assert Schedule(10 * MS).after(1_000 * MS) == 1_010 * MS  # after, not at


def test_a_late_response_delays_no_other() -> None:
    table: Timetable[str] = Timetable()
    table.add("a", Schedule(10, 0), 3, now_ns=95)
    table.add("b", Schedule(10, 5), 1, now_ns=95)
    assert table.next_ns == 100 and table.take(99) is None
    late = [table.take(121) for _ in range(5)]  # due at 100, 105, 110 and 120, all asked for at 121
    assert [tuple(one) for one in late if one] == [
        (100, "a", False), (105, "b", True), (110, "a", False), (120, "a", True)]  # fmt: skip
    assert late[-1] is None and table.next_ns is None


def test_errors_are_taken_from_what_was_really_sent() -> None:
    record = Record(7, 0, 0, [(round(ms * MS), 1) for ms in (103, 111, 125)], outcome=OK)
    times = ((100, 102), (110, 110.5), (120, 120.25))
    stamps = [struct.pack("<qq", round(due * MS), round(sent * MS)) for due, sent in times]
    found = timing_error.errors([record], {7: stamps}, interval_ms=10)
    assert found.ttft == [1.0]  # 103 - 102
    assert found.itl == [0.5, 4.25]  # |8 - 8.5| and |14 - 9.75|
    assert found.late == [2.0, 0.5, 0.25]
    assert found.rate_share == 20 / 22  # two intervals of 10 took from 103 to 125


def run(*, late: float = 0.1, error: float = 0.5) -> Run:
    return Run([error] * 100, [error / 10] * 1000, [late] * 1000, 1.0)


def test_a_run_with_a_late_server_is_discarded() -> None:
    assert run(late=1.0).kept and not run(late=1.001).kept
    assert Run([], [], [0.0] * 990 + [9.0] * 10, 1.0).kept  # p99: the 990th of 1,000
    assert not Run([], [], [0.0] * 989 + [9.0] * 11, 1.0).kept
    spoilt = [run(late=2, error=50)] * 3
    found = judge("it", "", [*spoilt, *[run()] * 5], AT_64)
    assert [bar.measured for bar in found] == [0.5, 0.5, 0.05, 0.05, 1.0] and exit_code(found) == 0
    assert exit_code(judge("it", "", [run(error=3.1)] * 5, AT_64)) == 1


def test_fewer_than_five_kept_runs_are_no_verdict() -> None:
    found = judge("it", "", [run()] * 4 + [run(late=2)] * 8, AT_64)
    assert [bar.measured for bar in found] == [None] and "4 of 12 runs kept" in found[0].conditions
    assert exit_code([*found, Bar("another", 1, 2, "")]) == 2


@pytest.mark.parametrize(("lateness", "made"), [
    ([0.0] * 12, 5), ([2.0] * 7 + [0.0] * 5, 12), ([2.0] * 12, 8), ([0.0, 2.0] * 6, 9)
])  # fmt: skip
def test_runs_are_made_until_five_are_kept_or_cannot_be(lateness: list[float], made: int) -> None:
    left = iter(lateness)
    assert len(until_enough(lambda: run(late=next(left)))) == made


async def _answer(endpoint: Endpoint, model: str, tokens: int, *, deadline_s: float | None = None) -> Record:
    wire = GrpcSender(endpoint)
    prepared = request(model, tokens, Schedule(1 * MS).prompt())
    try:
        return await wire.send(prepared, Record(0, 0), deadline_s)
    finally:
        await wire.close()


def check_stamps(endpoint: Endpoint) -> None:
    """Eight streams, two requests of twenty tokens each that count: all sent when due or later, received after that."""
    found = asyncio.run(timing_error.measure(endpoint, 8, 10, 0.4))
    assert (len(found.ttft), len(found.itl), len(found.late)) == (16, 16 * 19, 16 * 20)
    assert min(found.late) >= 0 and min(found.ttft) > 0


def test_the_bare_server_keeps_its_schedule_and_counts() -> None:
    with known_servers.bare() as server:
        check_stamps(server.endpoint)
        before = server.counted()
        records = [asyncio.run(_answer(server.endpoint, "null", 1)) for _ in range(3)]
        counted = server.counted()
    assert [one.outcome for one in records] == [OK] * 3 and [len(one.responses) for one in records] == [1] * 3
    assert before["requests"] == 24 and counted["requests"] == 27  # 8 of a ramp, 16 measured, 3
    assert before["last_ns"] < records[0].sent_ns < counted["last_ns"] < records[2].ended_ns


def test_the_bare_server_outlives_its_clients_and_their_flow_control() -> None:
    with known_servers.bare() as server:
        given_up = asyncio.run(_answer(server.endpoint, "scheduled", 10**6, deadline_s=0.2))
        assert given_up.outcome == "DeadlineExceeded" and given_up.responses
        # A response is above 100 bytes: 1,000 of them are more than the 65,535 that a stream is allowed at first.
        long = asyncio.run(_answer(server.endpoint, "scheduled", 1000))
    assert long.outcome == OK and len(long.responses) == 1000
    assert all(before <= after for (before, _), (after, _) in pairwise(long.responses))


@pytest.mark.server
def test_the_model_in_the_real_triton_keeps_its_schedule() -> None:
    with known_servers.triton() as server:
        check_stamps(server.endpoint)
