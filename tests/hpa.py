"""The HorizontalPodAutoscaler's documented algorithm, for tests: what it would do with a series of metrics.

Source: Kubernetes' documentation, "Horizontal Pod Autoscaling": *Algorithm details* (ratio, tolerance 0.1, the highest
of several metrics), *Configurable scaling behavior* (policies over a period, stabilisation windows); it looks
every 15 seconds (``--horizontal-pod-autoscaler-sync-period``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SYNC_S = 15
TOLERANCE = 0.1


def wanted(replicas: int, ratio: float) -> int:
    """ceil(replicas x ratio), or as many as there are where the ratio is near 1."""
    return replicas if abs(ratio - 1) <= TOLERANCE else math.ceil(round(replicas * ratio, 9))


@dataclass
class Autoscaler:
    """One HorizontalPodAutoscaler of version 2, with policies of type Pods and one policy each way."""

    spec: dict[str, Any]
    replicas: int
    _wishes: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)

    def look(self, now_s: float, ratios: Sequence[float]) -> int:
        """The replicas from now on; ``ratios``: each metric's value over its target, empty: no metric could be read."""
        if not ratios:
            return self.replicas
        wish = max(wanted(self.replicas, ratio) for ratio in ratios)
        wish = min(max(wish, self.spec["minReplicas"]), self.spec["maxReplicas"])
        self._wishes.append((now_s, wish))
        new = self._limited(now_s, self._stabilised(now_s, wish))
        if new != self.replicas:
            self._changes.append((now_s, new - self.replicas))
            self.replicas = new
        return self.replicas

    def _stabilised(self, now_s: float, wish: int) -> int:
        """Up by no more than the least wish of its window, down by no more than the greatest of its own."""
        up, down = self.spec["behavior"]["scaleUp"], self.spec["behavior"]["scaleDown"]
        low = min(count for at, count in self._wishes if at >= now_s - up["stabilizationWindowSeconds"])
        high = max(count for at, count in self._wishes if at >= now_s - down["stabilizationWindowSeconds"])
        return (
            min(max(self.replicas, min(wish, low)), high)
            if wish > self.replicas
            else max(min(self.replicas, high), low)
        )

    def _limited(self, now_s: float, count: int) -> int:
        """By the policies: so many pods within the period that ends now."""
        if count == self.replicas:
            return count
        rule = self.spec["behavior"]["scaleUp" if count > self.replicas else "scaleDown"]
        (policy,) = rule["policies"]
        pods, period_s = int(policy["value"]), int(policy["periodSeconds"])
        recent = [change for at, change in self._changes if at > now_s - period_s]
        if count > self.replicas:
            return min(count, self.replicas - sum(one for one in recent if one > 0) + pods)
        return max(count, self.replicas - sum(one for one in recent if one < 0) - pods)
