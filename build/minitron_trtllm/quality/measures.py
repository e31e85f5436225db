"""The figures: pure numpy, over log-probabilities of the tokens of a text.

All are means over the predicted tokens. Divergences are in nats, KL(reference || candidate) over the whole vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32]


def log_probabilities(logits: Rows) -> Rows:
    """Log-softmax over the last axis, in float32 with the sum in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    result: Rows = shifted - np.log(total).astype(np.float32)
    return result


@dataclass
class Likelihood:
    """How well a model predicts a text."""

    negative: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, rows: Rows, following: npt.NDArray[np.int64]) -> None:
        """Count positions: log-probabilities [n, vocab] and the ids [n] that follow."""
        self.negative.append(-rows[np.arange(len(following)), following].astype(np.float64))

    @property
    def tokens(self) -> int:
        """Predicted tokens so far."""
        return sum(map(len, self.negative))

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return math.exp(float(np.concatenate(self.negative).mean()))


@dataclass
class Divergence:
    """How far a model's distributions are from the reference's."""

    nats: list[npt.NDArray[np.float64]] = field(default_factory=list)
    same_best: int = 0

    def add(self, reference: Rows, candidate: Rows) -> None:
        """Count positions: log-probabilities [n, vocab] of both models."""
        self.nats.append(np.sum(np.exp(reference) * (reference - candidate), axis=-1, dtype=np.float64))
        self.same_best += int(np.count_nonzero(reference.argmax(axis=-1) == candidate.argmax(axis=-1)))

    def figures(self) -> dict[str, Any]:
        """Mean with its standard error, 99th percentile, and the share of positions with the same best token."""
        nats = np.concatenate(self.nats)
        return {
            "mean_kl": float(nats.mean()),
            "mean_kl_standard_error": float(nats.std() / math.sqrt(len(nats))),
            "p99_kl": float(np.percentile(nats, 99)),
            "top1_agreement": self.same_best / len(nats),
        }
