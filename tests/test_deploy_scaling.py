"""The scaling, by the controller's documented algorithm, on what a real server told under a step load.

The recording is of one server (``monitored.py``). How several share a load is a rule of this test: equally, as the
gateway does it by outstanding tokens; one generates for as many as its batch holds, and the rest waits.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import yaml

import chart
from hpa import SYNC_S, Autoscaler, wanted
from monitored import RECORDED


@pytest.mark.parametrize(
    ("replicas", "ratio", "expected"),
    # The documentation's own: twice the value, twice the replicas; half, half; within a tenth, nothing. And rounded up.
    [(3, 2.0, 6), (4, 0.5, 2), (5, 1.09, 5), (5, 0.91, 5), (5, 1.11, 6), (3, 0.1, 1)],
)
def test_the_ratio(replicas: int, ratio: float, expected: int) -> None:
    assert wanted(replicas, ratio) == expected


def hpa(most: int = 8) -> dict[str, Any]:
    """The chart's own object, for the recipe "cpu"."""
    auto = {"kind": "hpa", "minReplicas": 1, "maxReplicas": most}
    (objects,) = chart.render(chart.merged(chart.values_of("cpu"), {"autoscaling": auto}))
    spec = chart.only(objects, "HorizontalPodAutoscaler")["spec"]
    assert isinstance(spec, dict)
    return spec


def targets(spec: dict[str, Any]) -> tuple[float, float]:
    """Requests waiting in each, and the fraction of the cache in the fullest."""
    waiting, cache = spec["metrics"]
    return float(waiting["pods"]["target"]["averageValue"]), float(
        cache["external"]["target"]["value"].rstrip("m")
    ) / 1000


class Recording:
    """One server's figures every ten seconds, as the chart's rules give them: nothing while its steps stand still."""

    def __init__(self) -> None:
        document = json.loads(RECORDED.read_text(encoding="utf-8"))
        self.step_s, self.phases = document["step_s"], {one["name"]: one["at_s"] for one in document["phases"]}
        self._series = document["series"]
        steps = self._values("nv_trt_llm_general_metrics", general_type="iteration_counter")
        window = 60 // self.step_s
        working = [any(a != b for a, b in pairwise(steps[max(0, at - window) : at + 1])) for at in range(len(steps))]
        self.raw = self._values("nv_trt_llm_request_metrics", request_type="scheduled")
        waiting = self._values("nv_trt_llm_request_metrics", request_type="waiting")
        self.active = [(a or 0) + (b or 0) if on else 0.0 for a, b, on in zip(self.raw, waiting, working, strict=True)]
        fraction = self._values("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="fraction")
        held = [(f or 0) / s for f, s in zip(fraction, self.raw, strict=True) if s]
        #: Share of the cache that one sequence has in use.
        self.cache_per_sequence = sum(held) / len(held)
        self.batch = int(max(value or 0 for value in self.raw))

    def _values(self, name: str, **labels: str) -> list[float | None]:
        wanted_labels = labels | {"__name__": name}
        (one,) = [each for each in self._series if wanted_labels.items() <= each["labels"].items()]
        return [None if value is None else float(value) for value in one["values"]]

    def part(self, phase: str) -> list[float]:
        """The sequences in flight during a phase, without its first half minute, in which those of the last one end."""
        ends = [*sorted(self.phases.values()), len(self.active) * self.step_s]
        begin = self.phases[phase]
        return self.active[(begin + 30) // self.step_s : ends[ends.index(begin) + 1] // self.step_s]


def ratios(load: float, replicas: int, told: Recording, spec: dict[str, Any]) -> list[float]:
    """Each metric over its target, where so many servers share a load."""
    waiting_target, cache_target = targets(spec)
    each = load / replicas
    scheduled = min(each, told.batch)
    return [(each - scheduled) / waiting_target, scheduled * told.cache_per_sequence / cache_target]


def replayed(loads: list[float], told: Recording, spec: dict[str, Any]) -> list[int]:
    """Replicas at each look of the controller."""
    scaler = Autoscaler(spec, spec["minReplicas"])
    looks = range(0, len(loads) * told.step_s, SYNC_S)
    return [scaler.look(now, ratios(loads[now // told.step_s], scaler.replicas, told, spec)) for now in looks]


def turns(counts: list[int]) -> int:
    """How often growing became shrinking, or the other way."""
    moves = [b - a for a, b in pairwise(counts) if a != b]
    return sum(a * b < 0 for a, b in pairwise(moves))


def test_a_step_load_is_followed_once_up_and_once_down() -> None:
    told, spec = Recording(), hpa()
    assert told.batch == 4
    light, heavy = told.part("light"), told.part("heavy")
    after = told.part("light again") * 15  # half an hour of what was recorded for two minutes
    counts = replayed(light + heavy + after, told, spec)
    look = [len(light) * told.step_s // SYNC_S, len(light + heavy) * told.step_s // SYNC_S]
    assert max(counts[: look[0]]) == 1  # two streams are no reason
    # 24 sequences in flight, four to a server: six at the least, within four minutes at two pods a minute.
    assert counts[look[0] + 16] >= 6
    assert min(counts[look[0] + 16 : look[1]]) >= 6
    assert turns(counts) == 1 and counts[-1] == 1
    # Not one goes before the window of five minutes is over, and then one in two minutes.
    falling = [place for place in range(look[1], len(counts)) if counts[place] < counts[place - 1]]
    assert (falling[0] - look[1]) * SYNC_S >= 240
    assert all((b - a) * SYNC_S >= 120 for a, b in pairwise(falling))


def test_a_load_that_swings_faster_than_the_window_is_not_followed() -> None:
    """Recorded parts in turn, a minute of each: once up, and held."""
    told, spec = Recording(), hpa()
    minute = 60 // told.step_s
    swing = (told.part("heavy")[minute : 2 * minute] + told.part("light again")[:minute]) * 20
    assert turns(replayed(swing, told, spec)) == 0


def test_what_an_idle_server_keeps_in_its_gauges_holds_nothing_up() -> None:
    """Raw, the last values stay (contract triton-model-repository.md, 6); as the rules record them they go."""
    told, spec = Recording(), hpa()
    idle = told.part("idle")
    assert idle[-1] == 0.0
    counts = replayed(told.part("heavy") + [idle[-1]] * 400, told, spec)
    assert counts[-1] == spec["minReplicas"]


def test_without_metrics_it_stays() -> None:
    scaler = Autoscaler(hpa(), 5)
    assert [scaler.look(at * SYNC_S, []) for at in range(100)] == [5] * 100


def test_keda_s_object_is_the_same_scaling() -> None:
    """KEDA makes an HPA: AverageValue is a sum over the replicas, Value is taken as it is (KEDA's documentation)."""
    auto = {"kind": "keda", "minReplicas": 1, "maxReplicas": 8}
    (objects,) = chart.render(chart.merged(chart.values_of("cpu"), {"autoscaling": auto}))
    scaled, spec = chart.only(objects, "ScaledObject")["spec"], hpa()
    assert scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == spec["behavior"]
    assert tuple(float(one["metadata"]["threshold"]) for one in scaled["triggers"]) == targets(spec)
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (spec["minReplicas"], spec["maxReplicas"])
    assert yaml.safe_dump(scaled)
