"""The screened output head: hidden states to logits, by the 16-bit weights of the words that matter.

One stream is bound by the bytes that a token reads, and of an int4 engine's more than half are the 16-bit head's. The
screened head reads half of those. An int8 copy of the head gives every word an approximate logit and, with its rounding
error, an interval that holds the word's true one (Cauchy-Schwarz)::

    |h . w - h . w8| <= |h| |w - w8|

Words whose interval reaches above the best lower end are all that can be the best word. They, and never fewer than
``CANDIDATES``, get their true logits from the 16-bit rows; the others keep their approximate ones. So the most
probable word is the 16-bit head's by construction, and nothing has to be trusted. ``_MOST_ROWS`` bounds the memory:
where even more words could be the best (all intervals overlap, in a model that knows nothing), the likeliest of them
are taken.

``openvino_genai`` 2026.4 puts its own gather of the sampled rows before a tail that it knows, one product; for any
other it looks for an input ``sampled_tokens_indices`` (int64 [rows]) and fills it. So the rows are gathered here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron.machine.cpu_head import HIDDEN, ROWS, WEIGHTS
from minitron.machine.openvino import opset13 as op
from minitron.machine.openvino import ov
from minitron_build.engines.openvino.nodes import ints, parameter

Node = Any

#: Words that get their true logits, at the least (fewer where the vocabulary is smaller). What lies outside of a top-p
#: set of 0.9 because of the screen: 0.15 % of positions at 256, 4.3 % at 64 (measured on the small Minitron).
CANDIDATES = 256
#: Candidates of all rows of a step together; as float32 rows of 3,072 they are 400 MB.
_MOST_ROWS = 32_768


@dataclass(frozen=True)
class Screen:
    """The cheap copy of a head: ``weights`` a float32 node [vocab, hidden], ``errors`` float32 [vocab]."""

    weights: Node
    errors: npt.NDArray[np.float32]


def rounding_errors(weights: npt.NDArray[np.float32], approximate: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What bounds the error of each row's product, over the length of the other vector; [rows] of [rows, hidden].

    The difference's length, and what float32 sums of n products may be off on either side (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1: n u |x| |y|). These lengths are such sums themselves: hence the last factor.
    """
    difference = approximate - weights
    off, length = (np.sqrt(np.einsum("ij,ij->i", each, each)) for each in (difference, weights))
    unit = np.float32(weights.shape[1] * 2.0**-24)
    bound: npt.NDArray[np.float32] = (off + unit * (2 * length + off)) * (1 + 2 * unit)
    return bound


def screened(hidden: Node, weights: Node, screen: Screen, *, proven: bool) -> tuple[Node, Node]:
    """Logits [rows, 1, vocab] of the rows asked for, and the parameter that asks.

    ``weights`` are the 16-bit rows as a Convert of their constant: gathered, they stay in 16 bits. ``proven``: take all
    words that could be the best one, which holds where products are computed in float32; else ``CANDIDATES`` of them.
    A step may have no rows: then shapes have a 0, which is why axes are put in and taken out, and never guessed.
    """
    rows = parameter(ROWS, 1)
    hidden.set_friendly_name(HIDDEN)
    weights.set_friendly_name(WEIGHTS)
    size = hidden.output(0).get_partial_shape()[2].get_length()
    chosen = op.gather(op.reshape(hidden, ints([-1, 1, size]), False), rows, ints(0))
    near = op.matmul(chosen, screen.weights, False, True)
    if proven:
        order, count = _could_be_best(chosen, near, rows, screen.errors)
    else:
        order, count = near, ints(min(CANDIDATES, len(screen.errors)))
    candidates = op.topk(order, count, 2, "max", "none", "i32").output(1)
    gathered = op.gather(weights, op.squeeze(candidates, ints([1])), ints(0))
    exact = op.matmul(chosen, gathered, False, True)
    return op.scatter_elements_update(near, candidates, exact, ints(2)), rows


def _could_be_best(chosen: Node, near: Node, rows: Node, errors: npt.NDArray[np.float32]) -> tuple[Node, Node]:
    """The upper end of each word's interval [rows, 1, vocab], and how many words a step's rows need, a scalar."""
    length = op.sqrt(op.reduce_sum(op.multiply(chosen, chosen), ints([2]), True))
    reach = op.multiply(length, op.constant(errors[None, None]))
    upper = op.add(near, reach)
    lower = op.reduce_max(op.subtract(near, reach), ints([2]), True)
    # A sum of ones is exact in float32 up to 16 million words, and 3 ms faster than one of converted truths.
    overlap = op.select(op.greater_equal(upper, lower), op.constant(np.float32(1)), op.constant(np.float32(0)))
    possible = op.convert(op.reduce_sum(overlap, ints([2]), False), ov.Type.i64)  # [rows, 1]
    least = min(CANDIDATES, len(errors))
    needed = op.reduce_max(op.concat([possible, ints([[least]])], 0), ints([0, 1]), False)
    shares = op.maximum(op.squeeze(op.shape_of(rows), ints([0])), ints(1))
    most = op.maximum(op.divide(ints(_MOST_ROWS), shares), ints(least))
    return upper, op.minimum(op.minimum(needed, most), ints(len(errors)))
