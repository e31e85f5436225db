"""Ask transformers' NemotronForCausalLM, in float32, for the perplexity of checkpoints: tests/data/quality.

Needs the extra ``reference`` (torch); run like ``make_fixtures.py``. The text is the held-out chapters, joined by empty
lines, tokenised whole, its first tokens cut into windows; all tokens of a window but the first are predicted.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer

from answers import SMALL_MODEL, sha256_of_weights
from make_fixtures import transformers_model
from minitron.model import shape
from minitron.model.precision import Precision
from nemotron_reference import rounded_weights, source_weights

DATA = Path(__file__).parent / "data"
CONTEXT, TOKENS = 256, 3000
PRECISIONS = {"bfloat16": Precision.BFLOAT16, "int8": Precision.INT8_WEIGHT_ONLY, "int4": Precision.INT4_WEIGHT_ONLY}


def main() -> None:
    """Write data/quality/transformers.json."""
    chapters = json.loads((DATA / "small_minitron" / "held_out.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    ids = tokenizer.encode("\n\n".join(chapters)).ids[:TOKENS]
    source = source_weights(SMALL_MODEL)
    sizes = shape.read(SMALL_MODEL / "config.json")
    found = {}
    for name, precision in PRECISIONS.items():
        model = transformers_model(sizes, rounded_weights(source, precision, "bfloat16"))
        total, count = 0.0, 0
        for start in range(0, len(ids), CONTEXT):
            window = torch.tensor([ids[start : start + CONTEXT]])
            if window.shape[1] > 1:
                with torch.inference_mode():
                    loss = model(input_ids=window, labels=window).loss  # the mean over all tokens but the first
                total, count = total + float(loss) * (window.shape[1] - 1), count + window.shape[1] - 1
        found[name] = math.exp(total / count)
    (DATA / "quality").mkdir(exist_ok=True)
    content = {
        "model_sha256": sha256_of_weights(SMALL_MODEL),
        "context": CONTEXT,
        "tokens": TOKENS,
        "perplexity": found,
    }
    (DATA / "quality" / "transformers.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
