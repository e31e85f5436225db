"""Ask transformers' NemotronForCausalLM for the answers that ``answers.py`` describes, and write tests/data/answers.

Needs the extra ``reference`` (torch), and is run when the small Minitron or the generator of random models changes::

    PYTHONPATH=models .venv-reference/bin/python tests/make_fixtures.py

The weights are what a checkpoint holds, worked out from the source by the contract and not by the converter, in
float32. Prompts are taken in turn from a list of candidates; one is passed over where, for any precision, the end id
is generated or the two best logits come closer than ``MARGIN``: float32 implementations differ by about 1e-5, so
closer calls say nothing about who is right.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer

import answers
import random_model
from minitron.model import shape as model_shape
from minitron.model.precision import ROUNDED
from minitron.model.shape import ModelShape
from nemotron_reference import rounded_weights, source_weights

MARGIN = 1e-3
PROMPTS = 20
SMALL_DATA = Path(__file__).parent / "data" / "small_minitron"
_OWN_PROMPTS = (
    "Once upon a time", "The", "In the beginning God", "And the LORD spake unto", "What is a language model?",
    "def main():\n    return 0", "naïve café", "日本語", "Ye  shall  not", "1, 2, 3, 4,", "Blessed are the", "\n",
)  # fmt: skip


def transformers_model(shape: ModelShape, weights: Mapping[str, NDArray[np.float32]]) -> Any:
    """Build NemotronForCausalLM of ``shape`` in float32 from the given weights, all of them."""
    config = transformers.NemotronConfig(**random_model.hugging_face_config(shape))
    model = transformers.NemotronForCausalLM(config).float().eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=True)
    return model


def logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    """Logits [token, vocabulary] of a prompt."""
    with torch.inference_mode():
        return np.asarray(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy())


def greedy(model: Any, ids: list[int]) -> tuple[list[int], float]:
    """The next 64 ids, the best one each time, and the smallest distance of the two best logits on the way."""
    found: list[int] = []
    margin = float("inf")
    cache, following = None, torch.tensor([ids])
    for _ in range(answers.NEW_TOKENS):
        with torch.inference_mode():
            output = model(input_ids=following, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        best = output.logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        found.append(int(best.indices[0]))
        following = best.indices[None, :1]
    return found, margin


def candidates(name: str, folder: Path) -> Iterator[list[int]]:
    """Prompts of 1 to 200 ids: for the small Minitron own and held-out sentences, else random ids."""
    pick = np.random.default_rng(1)
    if name != "small":
        while True:
            length = int(2 ** pick.uniform(0, 7.5))
            yield pick.integers(4, answers.OTHER_SHAPE.vocab_size, length).tolist()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in _OWN_PROMPTS:
        yield tokenizer.encode(text).ids
    chapters = json.loads((SMALL_DATA / "held_out.json").read_text(encoding="utf-8"))
    while True:
        verses = chapters[pick.integers(len(chapters))].splitlines()
        text = "\n".join(verses[pick.integers(len(verses)) :])
        yield tokenizer.encode(text).ids[: int(2 ** pick.uniform(2, 7.5))]


def answer(name: str, folder: Path) -> None:
    """Write the answers about one model."""
    source, shape = source_weights(folder), model_shape.read(folder / "config.json")
    models = {
        precision: transformers_model(shape, rounded_weights(source, precision, answers.dtype_of(precision, name)))
        for precision in ROUNDED
    }
    prompts: list[list[int]] = []
    continuations: dict[str, list[list[int]]] = {precision.value: [] for precision in models}
    margins, passed_over = [], 0
    for prompt in candidates(name, folder):
        runs = {precision: greedy(model, prompt) for precision, model in models.items()}
        margin = min(margin for _, margin in runs.values())
        if margin < MARGIN or any(answers.END_ID in ids for ids, _ in runs.values()):
            passed_over += 1
            continue
        prompts.append(prompt)
        margins.append(margin)
        for precision, (ids, _) in runs.items():
            continuations[precision.value].append(ids)
        if len(prompts) == PROMPTS:
            break
    places = places_of_logits(prompts)
    content = {
        "made_with": {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "model_sha256": answers.sha256_of_weights(folder),
        "smallest_margin": min(margins),
        "prompts_passed_over": passed_over,
        "prompts": prompts,
        "places": places,
        "continuations": continuations,
    }
    text = json.dumps(content).replace('], "', '],\n"').replace("], [", "],\n[")
    answers.FOLDER.mkdir(parents=True, exist_ok=True)
    (answers.FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    rows: dict[str, Any] = {
        precision.value: rows_of_logits(model, prompts, places) for precision, model in models.items()
    }
    np.savez_compressed(answers.FOLDER / f"{name}.npz", **rows)


def places_of_logits(prompts: list[list[int]]) -> list[tuple[int, int]]:
    """Where logits are kept: everywhere in the first prompt of 6 to 10 ids, at the end of the first eight prompts."""
    whole = next(i for i, prompt in enumerate(prompts) if 6 <= len(prompt) <= 10)
    places = [(whole, position) for position in range(len(prompts[whole]))]
    return places + [(i, len(prompt) - 1) for i, prompt in enumerate(prompts[:8]) if i != whole]


def rows_of_logits(model: Any, prompts: list[list[int]], places: list[tuple[int, int]]) -> NDArray[np.float32]:
    """Logits [place, vocabulary] at the given (prompt, position)."""
    whole = {i: logits(model, prompts[i]) for i, _ in places}
    return np.stack([whole[i][position] for i, position in places])


def main() -> int:
    """Answer about both models, or about those named."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or ("small", "other"):
            answer(name, answers.make_model(name, lambda: Path(scratch)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
