"""The token-bigram model that the small Minitron is measured against.

Interpolated absolute discounting with a Kneser-Ney lower order (Chen and Goodman 1999, section 2.7): of every count a
discount d is kept back and given to the tokens in proportion to how many different tokens they follow::

    p(b | a) = max(n(a, b) - d, 0) / n(a, .) + d * followers(a) / n(a, .) * p1(b)
    p1(b)    = (followed(b) + 1/2) / (pairs + V/2)
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
DISCOUNTS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def count(texts: Iterable[Ids], vocab_size: int) -> NDArray[np.int64]:
    """Count pairs of neighbours in tokenised texts: [vocab, vocab], row = first token."""
    counts = np.zeros((vocab_size, vocab_size), np.int64)
    for ids in texts:
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
    return counts


def best_perplexity(counts: NDArray[np.int64], texts: Iterable[Ids]) -> float:
    """Perplexity per token of ``texts`` (their first tokens are given) at the discount that suits them best.

    Choosing the discount on the very texts that are judged flatters the bigram model, and so never the other one.
    """
    pairs = np.concatenate([np.stack([ids[:-1], ids[1:]], axis=1) for ids in texts])
    losses = [-np.log(probabilities(counts, pairs, discount)).mean() for discount in DISCOUNTS]
    return float(np.exp(min(losses)))


def probabilities(counts: NDArray[np.int64], pairs: Ids, discount: float) -> NDArray[np.float64]:
    """p(b | a) for each row (a, b) of ``pairs``."""
    seen = counts > 0
    lower = (seen.sum(axis=0) + 0.5) / (seen.sum() + len(counts) / 2)
    first, second = pairs[:, 0], pairs[:, 1]
    total = counts.sum(axis=1)[first]
    direct = np.maximum(counts[first, second] - discount, 0) / np.maximum(total, 1)
    kept_back = np.where(total > 0, discount * seen.sum(axis=1)[first] / np.maximum(total, 1), 1.0)
    return np.asarray(direct + kept_back * lower[second])
