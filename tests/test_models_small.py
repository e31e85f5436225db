"""The small Minitron: its shape, its size, and that it knows more English than a bigram model."""

from __future__ import annotations

import json

import numpy as np
from tokenizers import Tokenizer

import bigram
from answers import Answers, sha256_of_weights
from conftest import DATA, SMALL_MODEL
from minitron.model import shape as model_shape
from nemotron_reference import logits, source_weights

MEASURED = DATA / "small_minitron"
WINDOW = 256


def test_it_has_what_makes_a_minitron() -> None:
    shape = model_shape.read(SMALL_MODEL / "config.json")
    assert shape.num_kv_heads < shape.num_heads
    assert shape.rotary_share == 0.5
    assert not shape.tied_embeddings
    assert shape.hidden_size % 256 == shape.intermediate_size % 256 == 0
    assert shape.num_heads % 2 == shape.num_kv_heads % 2 == 0
    assert shape.dtype == "bfloat16"
    assert "lm_head.weight" in source_weights(SMALL_MODEL)


def test_it_stays_within_six_megabytes_and_names_its_text() -> None:
    files = [path for path in SMALL_MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    readme = (SMALL_MODEL / "README.md").read_text()
    assert all(words in readme for words in ("King James Version", "bible-kjv-text", "public domain"))


def test_held_out_perplexity_is_at_most_six_tenths_of_a_bigram_models() -> None:
    """Chapters that neither saw; the bigram model has the counts of all the others. Windows as in train_small.py."""
    texts = json.loads((MEASURED / "held_out.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    documents = [np.array([*tokenizer.encode(text).ids, 3]) for text in texts]
    ratio = _perplexity(documents) / bigram.best_perplexity(_counts(), documents)
    assert ratio <= 0.6


def test_the_bigram_model_is_an_honest_one() -> None:
    """Its probabilities add up to one after any token, seen or not; it beats a unigram model by far."""
    counts = _counts()
    vocab_size = len(counts)
    for first in (300, int(counts.sum(axis=1).argmin())):
        pairs = np.array([[first, second] for second in range(vocab_size)])
        assert abs(bigram.probabilities(counts, pairs, 0.8).sum() - 1) < 1e-9
    frequency = counts.sum(axis=0) / counts.sum()
    unigram = np.exp(-(frequency[frequency > 0] * np.log(frequency[frequency > 0])).sum())
    texts = json.loads((MEASURED / "held_out.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    assert bigram.best_perplexity(counts, [np.array(tokenizer.encode(text).ids) for text in texts]) < unigram / 2


def test_the_answers_of_transformers_are_about_these_weights() -> None:
    assert Answers.load("small").model_sha256 == sha256_of_weights(SMALL_MODEL)


def _perplexity(documents: list[bigram.Ids]) -> float:
    shape, weights = model_shape.read(SMALL_MODEL / "config.json"), source_weights(SMALL_MODEL)
    losses = []
    for ids in documents:
        for start in range(0, len(ids) - 1, WINDOW - 1):
            window = ids[start : start + WINDOW]
            scores = logits(weights, shape, window[:-1]).astype(np.float64)
            total = np.log(np.exp(scores - scores.max(axis=1, keepdims=True)).sum(axis=1)) + scores.max(axis=1)
            losses.append(total - scores[np.arange(len(window) - 1), window[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


def _counts() -> bigram.Ids:
    vocab_size = model_shape.read(SMALL_MODEL / "config.json").vocab_size
    counts = np.zeros((vocab_size, vocab_size), np.int64)
    with np.load(MEASURED / "bigram_counts.npz") as stored:
        counts[stored["rows"], stored["columns"]] = stored["counts"]
    return counts
