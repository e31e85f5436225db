"""How many workers of the OpenAI gateway an engine can keep busy, from what a token was measured to cost there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minitron import data_files

_DATA = "gateway.yaml"


@dataclass(frozen=True)
class GatewayPlan:
    """``workers``: processes that the engine's best rate needs, each of a core; ``cores``: of them and Triton together.

    ``worker_tokens_per_s``: what one carries at most, with an event for each token; sent together, tokens cost less.
    ``source``: where the figures were measured. They are those of one machine, and the rate is a bound, so this is the
    number beyond which more workers cannot help.
    """

    workers: int
    worker_tokens_per_s: float
    cores: float
    source: str


def for_rate(tokens_per_s: float) -> GatewayPlan:
    """For an engine that makes so many tokens a second: rate times CPU time a token, in whole workers."""
    cost = data_files.load(_DATA)
    own, triton = cost["gateway_us_per_token"] / 1e6, cost["triton_us_per_token"] / 1e6
    return GatewayPlan(math.ceil(tokens_per_s * own), 1 / own, tokens_per_s * (own + triton), cost["source"])
