"""transformers on torch as a side of ``bench_cpu``: int8 weights by row and activations by tensor, as torch quantises
dynamically, in a process of its own.

Each linear layer, the head too, is torch's dynamically quantised one (its x86 kernels use the integer products of
AVX-512); everything else is transformers' own model in float32, with its own cache. It stands beside int8 alone: these
kernels have no 4 bits. torch's weight-only product (``aten::_weight_int8pack_mm``, which torchao's ends in) was tried
beside it on one layer of the 4B shape, torch 2.13, AVX-512: slower from one row (3 ms to 0.2, out of the cache) to 512
(400 ms to 100). The model is read in bfloat16 and quantised layer by layer, so that no more than the 16-bit model is in
memory at once. Greedy, past the end token; the prompts of a batch are of equal length, as the bench's are.

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

    torch.set_grad_enabled(False)
    tokenizer = Tokenizer.from_file(str(Path(sys.argv[1]) / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    _quantise(model)
    _generate(model, [[0, 0]], 2)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in asked["prompts"]]
        print(json.dumps(_generate(model, ids, asked["tokens"])), flush=True)
    return 0


def _quantise(model: Any) -> None:
    """Put int8 products in the place of the linear layers, and what is left into float32."""
    import torch
    from torch.ao.nn.quantized import dynamic
    from torch.ao.quantization import per_channel_dynamic_qconfig

    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, torch.nn.Linear):
                part.qconfig = per_channel_dynamic_qconfig
                setattr(module, name, dynamic.Linear.from_float(part.float()))
    model.float()


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
