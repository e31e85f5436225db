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
_FACTORED_AT_ONCE = 256


def quantize(weights: Floats, scales: Floats, gram: Floats) -> groups.Codes:
    """Codes [out, in] of ``weights`` [out, in] by ``scales`` [out, groups], for inputs whose G is ``gram`` [in, in]."""
    factor = _factor(gram)
    by_input, scales = np.ascontiguousarray(weights.T), np.ascontiguousarray(scales.T)
    divisors = np.where(scales > 0, scales, np.float32(1))
    ins, group = len(by_input), len(by_input) // len(scales)
    codes, errors = np.empty(by_input.shape, np.int8), np.empty_like(by_input)
    for start in range(0, ins, _INPUTS_AT_ONCE):
        stop = min(start + _INPUTS_AT_ONCE, ins)
        carried = factor[:start, start:stop].T @ errors[:start]
        corner = np.ascontiguousarray(factor[start:stop, start:stop].T)
        for place in range(start, stop):
            row = corner[place - start]
            owed = np.einsum("i,io->o", row[: place - start], errors[start:place])
            owed += carried[place - start]
            owed /= row[place - start]
            wanted = np.subtract(by_input[place], owed, out=owed)
            wanted /= divisors[place // group]
            code = np.clip(np.rint(wanted, out=wanted), groups.SMALLEST, groups.LARGEST, out=wanted)
            codes[place] = code
            code *= scales[place // group]
            np.subtract(code, by_input[place], out=errors[place])
    return np.ascontiguousarray(codes.T)


def _factor(gram: Floats) -> Floats:
    """R of ``gram`` and some damping; below its diagonal is what was there."""
    mean = float(np.diagonal(gram).mean()) or 1.0
    damping = DAMPING
    while True:
        damped = gram.copy()
        damped.flat[:: len(gram) + 1] += np.float32(damping * mean)
        try:
            _become_factor(damped)
            return damped
        except np.linalg.LinAlgError:  # float32 lost too much of it
            damping *= 10


def _become_factor(gram: Floats) -> None:
    """Cholesky's factor with the order turned round, a block of columns after the other, the last one first.

    numpy's own takes three times as long at the size of an MLP. Raises LinAlgError.
    """
    for stop in range(len(gram), 0, -_FACTORED_AT_ONCE):
        start = max(stop - _FACTORED_AT_ONCE, 0)
        columns = gram[:stop, start:stop]
        columns -= gram[:stop, stop:] @ gram[start:stop, stop:].T
        corner = np.linalg.cholesky(columns[start:][::-1, ::-1].astype(np.float64))[::-1, ::-1]
        columns[start:] = corner
        columns[:start] = columns[:start] @ np.linalg.inv(corner).T.astype(np.float32)
