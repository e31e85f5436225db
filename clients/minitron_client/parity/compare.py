"""Whether two engines of one checkpoint say the same, up to what arithmetic explains.

Two correct engines round differently, so their logits differ a little, and where two tokens are almost equally likely
they may choose differently; from there on the texts are different ones. So, per prompt, with r the reference:

* before the first difference, log probs of the same tokens must agree within ``tolerance``;
* at the first difference the two must be a near tie: log p of both choices equal within ``tolerance``, and neither
  above ln(1/2) + tolerance, since of two nearly equal tokens none can be much likelier than one half.

``tolerance`` is in nats and goes with the arithmetic of the weaker side: see TOLERANCES.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minitron.errors import InputError
from minitron_client.parity.stored import Continuation, Words

#: Nats that log probs may differ by, by the activation type of the engine under test. Logits of the CPU engine agree
#: with transformers' float32 within 3.6e-5 (docs/cpu-engine.md); 16-bit activations move logits of standard deviation
#: 2.5 by about 0.2 % (float16) and 1.5 % (bfloat16), the bounds that the checkpoint's own tests hold, and a log prob
#: by at most twice as much at a few standard deviations.
TOLERANCES = {"float16": 0.1, "bfloat16": 0.5, "float32": 0.01}


@dataclass(frozen=True)
class Compared:
    """One prompt: place of the first different token (None: none), and what log probs say.

    ``before``: largest difference of log probs of the same tokens before it. ``at``: difference of the two choices'
    log probs there. ``problem``: why arithmetic does not explain it.
    """

    prompt: str
    tokens: int
    first_difference: int | None
    before: float
    at: float | None
    problem: str | None

    @property
    def equal_tokens(self) -> int:
        """Tokens before the first difference."""
        return self.tokens if self.first_difference is None else self.first_difference


def compare(found: Words, reference: Words, tolerance: float) -> list[Compared]:
    """Compare prompt by prompt; raises InputError where they are not about the same."""
    if found.checkpoint != reference.checkpoint:
        raise InputError(
            f"the reference is of checkpoint {reference.checkpoint}, and this engine of {found.checkpoint}: convert "
            "both from the same model with the same precision"
        )
    asked = [(one.input_ids, len(one.token_ids)) for one in found.continuations]
    if asked != [(one.input_ids, len(one.token_ids)) for one in reference.continuations]:
        raise InputError("the reference is of other prompts, or of another tokenizer; make it again")
    return [_compare(*pair, tolerance) for pair in zip(found.continuations, reference.continuations, strict=True)]


def _compare(found: Continuation, reference: Continuation, tolerance: float) -> Compared:
    pairs = zip(found.token_ids, reference.token_ids, strict=True)
    place = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    differences = [abs(a - b) for a, b in zip(found.log_probs[:place], reference.log_probs[:place], strict=True)]
    before = max(differences, default=0.0)
    at = None if place is None else abs(found.log_probs[place] - reference.log_probs[place])
    return Compared(found.prompt, len(found.token_ids), place, before, at,
                    _problem(found, reference, place, differences, tolerance))  # fmt: skip


def _problem(
    found: Continuation, reference: Continuation, place: int | None, differences: Sequence[float], tolerance: float
) -> str | None:
    worst = max(range(len(differences)), key=differences.__getitem__, default=None)
    if worst is not None and differences[worst] > tolerance:
        ours, theirs = found.log_probs[worst], reference.log_probs[worst]
        return f"token {worst} has log prob {ours:.3f}, and {theirs:.3f} in the reference"
    if place is None:
        return None
    ours, theirs = found.log_probs[place], reference.log_probs[place]
    where = (
        f"token {place} is {found.token_ids[place]} (log prob {ours:.3f}), and {reference.token_ids[place]} "
        f"({theirs:.3f}) in the reference"
    )
    if abs(ours - theirs) > tolerance or max(ours, theirs) > math.log(0.5) + tolerance:
        return f"{where}: no near tie"
    return None
