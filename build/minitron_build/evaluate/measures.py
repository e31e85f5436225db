"""The figures: pure numpy, over log-probabilities of the tokens of a text.

All are means over the predicted tokens. Divergences are in nats, KL(reference || candidate) over the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

#: Of the sets of likely tokens that are compared.
TOP_P = 0.9

Rows = npt.NDArray[np.float32]
#: Kind of activation → largest magnitude of each layer.
Peaks = dict[str, list[float]]


def log_probabilities(logits: Rows) -> Rows:
    """Log-softmax over the last axis, in float32 with the sum in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    result: Rows = shifted - np.log(total).astype(np.float32)
    return result


@dataclass
class Window:
    """What one window of the text gave, counted some positions at a time.

    ``negative``: negative log-likelihood of each predicted token; ``nats``: divergence from the reference at each, and
    ``same_best`` how often both have the same best token, ``same_nucleus`` how often the same set of likely ones
    (``nucleus``); empty and 0 for the reference itself. ``peaks``: the largest magnitudes of activations.
    """

    negative: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    same_best: int = 0
    same_nucleus: int = 0
    peaks: Peaks = field(default_factory=dict)

    def reach(self, peaks: Peaks) -> None:
        """Count magnitudes; one that is no number stays."""
        for kind, values in peaks.items():
            before = self.peaks.get(kind, [0.0] * len(values))
            self.peaks[kind] = np.maximum(before, values).tolist()

    def add(self, rows: Rows, following: npt.NDArray[np.int64], reference: Rows | None = None) -> None:
        """Count positions: log-probabilities [n, vocab], the ids [n] that follow, and the reference's [n, vocab]."""
        self.negative += (-rows[np.arange(len(following)), following].astype(np.float64)).tolist()
        if reference is not None:
            self.nats += np.sum(np.exp(reference) * (reference - rows), axis=-1, dtype=np.float64).tolist()
            self.same_best += int(np.count_nonzero(reference.argmax(axis=-1) == rows.argmax(axis=-1)))
            self.same_nucleus += sum(nucleus(one) == nucleus(other) for one, other in zip(reference, rows, strict=True))


def nucleus(row: Rows) -> frozenset[int]:
    """The tokens that top-p sampling draws from: the likeliest ones that together reach ``TOP_P``; of [vocab].

    Tokens below (1 - p) / vocab cannot be among them: all of those together have less than 1 - p.
    """
    likely = np.flatnonzero(row >= math.log((1 - TOP_P) / len(row)))
    order = likely[np.argsort(-row[likely], kind="stable")]
    mass = np.cumsum(np.exp(row[order].astype(np.float64)))
    return frozenset(order[: int(np.searchsorted(mass, TOP_P)) + 1].tolist())


def figures(windows: Sequence[Window]) -> dict[str, Any]:
    """How many tokens were predicted, and the perplexity: exp of the mean negative log-likelihood.

    For a candidate also the divergence's mean with its standard error and 99th percentile, and the shares of positions
    with the same best token and with the same nucleus.
    """
    negative, nats = (np.concatenate([getattr(window, name) for window in windows]) for name in ("negative", "nats"))
    found = {"tokens": len(negative), "perplexity": math.exp(float(negative.mean()))}
    if len(nats) == 0:
        return found
    return found | {
        "mean_kl": float(nats.mean()),
        "mean_kl_standard_error": float(nats.std() / math.sqrt(len(nats))),
        "p99_kl": float(np.percentile(nats, 99)),
        "top1_agreement": sum(window.same_best for window in windows) / len(nats),
        "top_p_agreement": sum(window.same_nucleus for window in windows) / len(nats),
    }
