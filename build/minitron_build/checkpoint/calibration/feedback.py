"""Rounding with feedback: each weight is rounded so that it makes up for the errors of those before it in its row.

What rounding costs is the change of the outputs: for e = rounded - weights of a row and G = sum of x x^T over the
calibration tokens it is e G e^T. With G = R R^T, R upper triangular, that is the sum over inputs j of
(e_j R_jj + sum over i < j of e_i R_ij)^2, so that going from the first input to the last each term can be made as small
as the codes allow, whatever follows. Idea: E. Frantar et al., "GPTQ" (arXiv 2210.17323), in the form of J. Chee et al.,
"QuIP" (arXiv 2307.13304), which needs no inverse.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from minitron_build.checkpoint import groups

Floats = npt.NDArray[np.float32]

DAMPING = 0.01
"""Added to G's diagonal, as a share of its mean: what was not seen in the calibration text is not free."""

_INPUTS_AT_ONCE = 64


def quantize(weights: Floats, scales: Floats, gram: Floats) -> groups.Codes:
    """Codes [out, in] of ``weights`` [out, in] by ``scales`` [out, groups], for inputs whose G is ``gram`` [in, in]."""
    factor = _factor(gram)
    outs, ins = weights.shape
    divisors = np.where(scales > 0, scales, np.float32(1))
    group = ins // scales.shape[1]
    codes, errors = np.empty((outs, ins), np.int8), np.zeros((outs, ins), np.float32)
    for start in range(0, ins, _INPUTS_AT_ONCE):
        stop = min(start + _INPUTS_AT_ONCE, ins)
        carried = errors[:, :start] @ factor[:start, start:stop]
        for place in range(start, stop):
            owed = carried[:, place - start] / factor[place, place]
            scale, divisor = scales[:, place // group], divisors[:, place // group]
            code = np.clip(np.rint((weights[:, place] - owed) / divisor), groups.SMALLEST, groups.LARGEST)
            codes[:, place] = code
            error = code * scale - weights[:, place]
            errors[:, place] = error
            carried[:, place - start + 1 :] += error[:, None] * factor[place, place + 1 : stop]
    return codes


def _factor(gram: Floats) -> Floats:
    """R upper triangular with R R^T = ``gram`` and some damping: Cholesky's factor, with the order turned round."""
    mean = float(np.diagonal(gram).mean()) or 1.0
    turned = np.ascontiguousarray(gram[::-1, ::-1])
    damping = DAMPING
    while True:
        damped = turned.copy()
        damped.flat[:: len(gram) + 1] += np.float32(damping * mean)
        try:
            return np.ascontiguousarray(np.linalg.cholesky(damped)[::-1, ::-1])
        except np.linalg.LinAlgError:  # float32 lost too much of it
            damping *= 10
