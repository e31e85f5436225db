"""What transformers' NemotronForCausalLM answered, in float32, on the weights of checkpoints: committed, small.

``make_fixtures.py`` made the files in ``data/answers`` and can make them again. ``Answers.load("small")`` is about
the small Minitron, ``Answers.load("other")`` about a random model of other sizes, which ``make_model`` writes anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import random_model
from minitron.model.precision import Precision
from minitron.model.shape import ModelShape

FOLDER = Path(__file__).parent / "data" / "answers"
SMALL_MODEL = Path(__file__).parent.parent / "models" / "small-minitron"
NEW_TOKENS = 64
END_ID = 3

#: Other head ratio, head size, rotary share and theta than the small Minitron; an odd vocabulary; float32 weights.
OTHER_SHAPE = ModelShape(
    vocab_size=1031, hidden_size=384, intermediate_size=640, num_layers=3, num_heads=6, num_kv_heads=2,
    max_positions=512, norm_epsilon=2e-5, rotary_share=0.25, rotary_base=50000.0, tied_embeddings=False,
    dtype="float32",
)  # fmt: skip
OTHER_SEED = 20


@dataclasses.dataclass(frozen=True)
class Variant:
    """Answers on the weights of one precision: per prompt the 64 greedy ids; logits for the places of ``places``."""

    continuations: list[list[int]]
    logits: NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Answers:
    """Prompts (ids), and transformers' answers for each precision of a model.

    ``places`` are the (prompt, position) of the rows of logits. The end id occurs in no continuation, and the two best
    logits on the way are never closer than ``smallest_margin``.
    """

    model_sha256: str
    prompts: list[list[int]]
    places: list[tuple[int, int]]
    smallest_margin: float
    variants: dict[Precision, Variant]

    @classmethod
    def load(cls, name: str) -> Answers:
        """Read the answers about the model ``name``: "small" or "other"."""
        raw = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        with np.load(FOLDER / f"{name}.npz") as logits:
            variants = {
                Precision(precision): Variant(continuations, logits[precision])
                for precision, continuations in raw["continuations"].items()
            }
        places = [(prompt, position) for prompt, position in raw["places"]]
        return cls(raw["model_sha256"], raw["prompts"], places, raw["smallest_margin"], variants)


def dtype_of(precision: Precision, name: str) -> str:
    """The activation type of the checkpoint: what the precision says, else ``auto`` (float32 sources: float16)."""
    if not precision.is_weight_only:
        return precision.value
    return {"small": "bfloat16", "other": "float16"}[name]


def make_model(name: str, new_folder: Callable[[], Path]) -> Path:
    """The folder of the model ``name``, written below ``new_folder()`` where it is not in the repository."""
    if name == "small":
        return SMALL_MODEL
    output = new_folder() / "other-minitron"
    random_model.write_random_model(output, OTHER_SHAPE, seed=OTHER_SEED)
    return output


def sha256_of_weights(folder: Path) -> str:
    """Name the weights that answers are about."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
