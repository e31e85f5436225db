"""transformers on torch as a side of ``bench_cpu``: int8 weights by row, 16-bit arithmetic, in a process of its own.

Each linear layer, the head too, is ``torch.ops.aten._weight_int8pack_mm`` over int8 rows with a scale, the product that
torchao's weight-only int8 ends in on a CPU (read in torch 2.13); everything else is transformers' own bfloat16 model,
with its own cache. It stands beside int8 alone: torch has no such product of 4 bits that takes a scale for each row.
Quantised layer by layer from the mapped file, so that it takes the 16-bit model's memory once at the most. Greedy, past
the end token; the prompts of a batch are of equal length, as the bench's are.

Runs with the Python of the extra ``reference``, which has torch.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any


def torch_int8(environment: Path, model: Path) -> AbstractContextManager[Any]:
    """The side, loaded and warm, by the Python of that environment."""
    import cpu_sides

    return cpu_sides.child("torch", __file__, model, python=environment / "bin" / "python")


def main() -> int:
    """The child: load, then measure what each line asks for."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    torch.set_grad_enabled(False)
    tokenizer = Tokenizer.from_file(str(Path(sys.argv[1]) / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    _quantise(model)
    _generate(model, [[0, 0]], 2)
    print(json.dumps({"load_s": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in asked["prompts"]]
        print(json.dumps(_generate(model, ids, asked["tokens"])), flush=True)
    return 0


def _quantise(model: Any) -> None:
    """Put int8 products in the place of the linear layers."""
    import torch

    class Int8Linear(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, linear: Any) -> None:
            super().__init__()
            weight = linear.weight.float()
            self.scales = (weight.abs().amax(dim=1) / 127).to(torch.bfloat16)
            codes = torch.round(weight / self.scales.float()[:, None])
            self.codes = codes.clamp(-128, 127).to(torch.int8).contiguous()

        def forward(self, hidden: Any) -> Any:
            rows = hidden.reshape(-1, hidden.shape[-1])
            made = torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scales)
            return made.reshape(*hidden.shape[:-1], -1)

    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, torch.nn.Linear):
                setattr(module, name, Int8Linear(part))


def _generate(model: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """All prompts in one batch."""
    import torch

    began = time.perf_counter()
    ids = torch.tensor(prompts)
    first, cache = 0.0, None
    for _ in range(tokens):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1].argmax(dim=-1, keepdim=True)
        first = first or time.perf_counter()
    return {"ttft_s": first - began, "seconds": time.perf_counter() - began, "tokens": len(prompts) * tokens}


if __name__ == "__main__":
    sys.exit(main())
