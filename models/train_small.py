"""Train the small Minitron: a real NemotronForCausalLM of 2.8 million weights that continues a prompt in English.

The text is the King James Version of the Bible, in the public domain, from the Debian package bible-kjv-text (its
program, in bible-kjv, prints it)::

    apt-get download bible-kjv bible-kjv-text && for p in bible-kjv*.deb; do dpkg -x $p kjv; done
    kjv/usr/bin/bible -p kjv/usr/lib -f gen1:1-rev22:21 > kjv.txt
    python models/train_small.py --text kjv.txt --output models/small-minitron

Needs the extra ``reference`` (torch, transformers, sentencepiece). One chapter is one document, a verse a line; every
twentieth chapter is held out. Prints the held-out perplexity beside that of a token-bigram model of the same split.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from transformers import NemotronConfig, NemotronForCausalLM

import bigram
import tokenizer_files

END = tokenizer_files.SPECIAL_TOKENS.index("</s>")
HELD_OUT_EVERY = 20
WINDOW = 256  # tokens a training sample holds, and the context that perplexity is measured with
VOCAB_SIZE = 1024
MAX_POSITIONS = 2048
MUON_RATE, ADAMW_RATE = 1e-2, 3e-3

CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": MAX_POSITIONS,
    "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "norm_eps": 1e-5, "hidden_act": "relu2",
    "tie_word_embeddings": False, "bos_token_id": 2, "eos_token_id": END, "attention_bias": False, "mlp_bias": False,
    "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "model_type": "nemotron",
    "architectures": ["NemotronForCausalLM"], "torch_dtype": "bfloat16",
}  # fmt: skip


def chapters(text: Path) -> list[str]:
    """Read ``Ge1:1 In the beginning …`` lines and return the chapters, a verse a line."""
    found: dict[str, list[str]] = {}
    for line in text.read_text(encoding="ascii").splitlines():
        match = re.fullmatch(r"(\w+):\d+ (.+)", line)
        if not match:
            raise SystemExit(f"error: {text}: no verse: {line[:60]!r}; print the text as the top of this file says")
        found.setdefault(match[1], []).append(match[2].strip())
    return ["\n".join(verses) for verses in found.values()]


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the documents into those to train on and those held out."""
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [text for i, text in enumerate(documents, 1) if i % HELD_OUT_EVERY], list(held_out)


def train_tokenizer(documents: Iterable[str]) -> bytes:
    """Train a SentencePiece BPE model as Nemotron-4's is described: bytes for what is unknown, digits one by one,
    white space kept as it is (Nemotron-4 15B technical report, section 2).
    """
    lines = (line for text in documents for line in text.splitlines())
    model = io.BytesIO()
    unk, pad, bos, end = range(4)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=VOCAB_SIZE, model_type="bpe", byte_fallback=True,
        split_digits=True, remove_extra_whitespaces=False, normalization_rule_name="identity", num_threads=1,
        unk_id=unk, pad_id=pad, bos_id=bos, eos_id=end, unk_surface="<unk>", character_coverage=1.0,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def encode(tokenizer: Any, documents: Iterable[str]) -> list[bigram.Ids]:
    """Turn each document into ids, the end token last."""
    return [np.array([*tokenizer.encode(text), END], np.int64) for text in documents]


def windows(ids: bigram.Ids) -> list[bigram.Ids]:
    """Cut a document into windows that overlap by one token, so that all but its first token are predicted once."""
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW - 1)]


def perplexity(model: Any, texts: Iterable[bigram.Ids]) -> float:
    """Perplexity per token of tokenised documents, in float32, window by window."""
    total, number = 0.0, 0
    for window in (piece for ids in texts for piece in windows(ids)):
        ids = torch.from_numpy(window)[None]
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        number += len(window) - 1
    return math.exp(total / number)


def new_model(seed: int) -> Any:
    """Make the untrained model; the norms start as identity (LayerNorm1P: weight 0)."""
    torch.manual_seed(seed)
    model = NemotronForCausalLM(NemotronConfig(**CONFIG))
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.zeros_(weight)
    return model


def train(model: Any, texts: Sequence[bigram.Ids], steps: int, batch: int, seed: int) -> None:
    """Minimise the cross-entropy over random windows, with rates that warm up and then fall to nothing."""
    stream = torch.from_numpy(np.concatenate(texts))
    pick = torch.Generator().manual_seed(seed)
    optimizers = _optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: _rate(step, steps)) for one in optimizers]
    model.train()
    started = time.monotonic()
    for step in range(steps):
        starts = torch.randint(len(stream) - WINDOW, (batch,), generator=pick)
        ids = torch.stack([stream[start : start + WINDOW] for start in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for one in (*optimizers, *schedules):
            one.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step}: loss {loss.item():.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    model.eval()


def _optimizers(model: Any) -> list[Any]:
    """Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for the embedding, the head and the norms."""
    layers = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name]
    ends = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." not in name]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": ends, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(layers, lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=ADAMW_RATE, betas=(0.9, 0.95)),
    ]


def _rate(step: int, steps: int) -> float:
    """Share of the peak rate: linear up over the first twentieth, then linear down to nothing."""
    return min((step + 1) * 20 / steps, (steps - step) / (0.95 * steps))


def save(model: Any, folder: Path) -> None:
    """Write config.json, generation_config.json and the weights, in bfloat16."""
    from safetensors.torch import save_file

    weights = {name: weight.detach().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    generation = {"_from_model_config": True, "bos_token_id": CONFIG["bos_token_id"], "eos_token_id": END}
    for name, content in (("config.json", CONFIG), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the small Minitron on the King James Version.")
    parser.add_argument("--text", type=Path, required=True, help="what `bible -f gen1:1-rev22:21` prints")
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face folder to write into")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16, help=f"windows of {WINDOW} tokens a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--test-data", type=Path, help="folder for the held-out excerpt and the bigram counts")
    return parser


def main() -> int:
    """Train, measure, write; print one JSON document with what was measured."""
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    seen, held_out = split(chapters(args.text))
    sentencepiece_model = train_tokenizer(seen)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    pieces = [(tokenizer.id_to_piece(i), tokenizer.get_score(i)) for i in range(tokenizer.vocab_size())]
    tokenizer_files.write(args.output, sentencepiece_model, pieces, MAX_POSITIONS)
    seen_ids, held_out_ids = encode(tokenizer, seen), encode(tokenizer, held_out)
    counts = bigram.count(seen_ids, VOCAB_SIZE)
    model = new_model(args.seed)
    train(model, seen_ids, args.steps, args.batch, args.seed)
    model.to(torch.bfloat16)
    save(model, args.output)
    model.float()
    measured = {
        "tokens_seen": sum(map(len, seen_ids)),
        "tokens_held_out": sum(map(len, held_out_ids)),
        "perplexity": perplexity(model, held_out_ids),
        "bigram_perplexity": bigram.best_perplexity(counts, held_out_ids),
    }
    measured["ratio"] = measured["perplexity"] / measured["bigram_perplexity"]
    if args.test_data:
        write_test_data(args.test_data, held_out, counts)
    print(json.dumps(measured, indent=1))
    return 0


def write_test_data(folder: Path, held_out: Sequence[str], counts: Any) -> None:
    """Write what a test needs to measure again: some held-out chapters, and the bigram counts as (row, column, n)."""
    folder.mkdir(parents=True, exist_ok=True)
    excerpt = held_out[:: len(held_out) // 6]
    (folder / "held_out.json").write_text(json.dumps(excerpt, indent=1) + "\n", encoding="utf-8")
    rows, columns = np.nonzero(counts)
    np.savez_compressed(
        folder / "bigram_counts.npz",
        rows=rows.astype(np.uint16), columns=columns.astype(np.uint16), counts=counts[rows, columns].astype(np.uint16),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
