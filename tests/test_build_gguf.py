"""GGUF as a source. The judges: files that llama.cpp itself ran (hashes in data/gguf/runs.json) or made (tiny-*.gguf),
the Hugging Face conversion of the same weights, SentencePiece, and the gguf package's own reader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer

import gguf_files
from conftest import DATA, SMALL_MODEL, minitron
from minitron.errors import ModelError
from minitron_build.checkpoint.convert import convert
from minitron_build.sources.gguf import GgufModel

RUNS = json.loads((DATA / "gguf" / "runs.json").read_text(encoding="utf-8"))
TINY = json.loads((DATA / "gguf" / "tiny.json").read_text(encoding="utf-8"))
KINDS = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "Q2_K")
ALL = [("float16", "auto"), ("bfloat16", "auto"), ("int8_weight_only", "float16"), ("int8_weight_only", "bfloat16"),
       ("int4_weight_only", "float16"), ("int4_weight_only", "bfloat16")]  # fmt: skip
MIXED_TEXTS = (
    "In the beginning God created the heaven and the earth.", "def main():\n\treturn {'a': [1, 2]}  # two  spaces\n",
    "naïve café, Ångström, señor", "😀 👩‍👩‍👧 ✓", "日本語と中文 한국어", "  two leading", " one", "a  b   c    d",
    "", " ", "\n\n", "\x00\x7f\u200b", "\U0001f9ff\ud7ff", "<s> and </s> and <unk>", "▁under ▁ ▁▁", "x" * 50, "12345",
)  # fmt: skip


@pytest.fixture(scope="module")
def taken_by_llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """``(type, parts)``: a GGUF file of the small Minitron, byte for byte one that llama.cpp ran."""
    folder = tmp_path_factory.mktemp("gguf")

    def make(kind: str, parts: int = 1) -> Path:
        path = gguf_files.write_model(SMALL_MODEL, folder, kind, parts)
        hashes = [hashlib.sha256(part.read_bytes()).hexdigest() for part in gguf_files.file_and_parts(path)]
        run = next(run for run in RUNS["files"] if (run["type"], run["parts"]) == (kind, parts))
        assert hashes == run["sha256"], "llama.cpp has not run this file; see make_gguf_fixtures.py"
        return path

    return make


def test_llama_cpp_continues_the_written_files_as_transformers_does_the_model() -> None:
    runs = {(run["type"], run["parts"]): run["greedy"] for run in RUNS["files"]}
    assert runs["F32", 1] == runs["F32", 3] == RUNS["greedy"]
    assert [len(ids) for ids in RUNS["greedy"]] == [32] * 20


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "rank0.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(("precision", "dtype"), ALL)
def test_checkpoint_equals_the_one_from_hugging_face(
    precision: str, dtype: str, taken_by_llama_cpp: Callable[[str, int], Path], tmp_path: Path
) -> None:
    convert(SMALL_MODEL, tmp_path / "hf", precision=precision, dtype=dtype)
    files = [("F32", 1), ("F32", 3), ("BF16", 1), ("BF16", 2)]
    if "float16" in (precision, dtype):
        files.append(("F16", 1))
    for kind, parts in files:
        out = tmp_path / f"{kind}-{parts}"
        convert(taken_by_llama_cpp(kind, parts), out, precision=precision, dtype=dtype)
        assert weights(out) == weights(tmp_path / "hf"), (kind, parts)
        assert (out / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes(), (kind, parts)


@pytest.mark.parametrize(("kind", "dtype"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float16")])
def test_auto_is_bfloat16_for_bfloat16_files_else_float16(
    kind: str, dtype: str, taken_by_llama_cpp: Callable[[str, int], Path], tmp_path: Path
) -> None:
    assert convert(taken_by_llama_cpp(kind, 1), tmp_path / "c").manifest.details["dtype"] == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_the_gguf_packages(kind: str) -> None:
    path = DATA / "gguf" / f"tiny-{kind}.gguf"
    found = 0
    with GgufModel(path) as source:
        ours = source.tensors()
        for tensor in gguf.GGUFReader(path).tensors:
            wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            name = hugging_face(tensor.name)
            if name.endswith("norm.weight"):
                wanted = wanted - np.float32(1)
            rows = ours[name].shape[0]
            values = np.concatenate([ours[name].read(0, rows // 3), ours[name].read(rows // 3, rows)])
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, wanted.reshape(values.shape), name)
            found += 1
    assert found == len(ours)


def hugging_face(name: str) -> str:
    """The inverse of what the writer of test files does, worked out from all names that can occur."""
    modules = [*gguf_files._NAMES, *(f"model.layers.0.{module}" for module in gguf_files._LAYER_NAMES)]
    names = {gguf_files.llama_cpp_name(f"{module}.{part}"): f"{module}.{part}"
             for module in modules for part in ("weight", "bias")}  # fmt: skip
    return names[name]


def test_what_was_lost_is_said_and_each_tensors_type_recorded(tmp_path: Path) -> None:
    done = convert(DATA / "gguf" / "tiny-Q4_K_M.gguf", tmp_path / "c")
    types = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(DATA / "gguf" / "tiny-Q4_K_M.gguf").tensors
    }
    assert done.manifest.details["source_types"] == {hugging_face(name): kind for name, kind in types.items()}
    assert {"Q4_K", "Q6_K", "F32"} <= set(types.values())
    said = " ".join(done.manifest.details["lost_before"])
    assert "Q4_K" in said
    assert "Q6_K" in said
    assert done.manifest.input.kind == "gguf"


def test_f16_files_say_what_a_bfloat16_model_lost(
    taken_by_llama_cpp: Callable[[str, int], Path], tmp_path: Path
) -> None:
    done = convert(taken_by_llama_cpp("F16", 1), tmp_path / "c", precision="bfloat16")
    assert any("F16" in sentence for sentence in done.manifest.details["lost_before"])


def test_token_ids_equal_sentencepieces(taken_by_llama_cpp: Callable[[str, int], Path], tmp_path: Path) -> None:
    convert(taken_by_llama_cpp("BF16", 1), tmp_path / "c")
    ours = Tokenizer.from_file(str(tmp_path / "c" / "tokenizer" / "tokenizer.json"))
    original = Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    reference = sentencepiece.SentencePieceProcessor()
    reference.LoadFromFile(str(SMALL_MODEL / "tokenizer.model"))
    chapters = json.loads((DATA / "small_minitron" / "held_out.json").read_text(encoding="utf-8"))
    for text in (*MIXED_TEXTS, *chapters[:20]):
        ids = ours.encode(text).ids
        assert ids == original.encode(text).ids, text
        assert ours.decode(ids) == original.decode(ids), text
        if "<" not in text and text.strip("\x00"):  # SentencePiece itself takes no special token from a text
            assert ids == reference.EncodeAsIds(text), text


def test_tokenizer_names_its_special_tokens(taken_by_llama_cpp: Callable[[str, int], Path], tmp_path: Path) -> None:
    convert(taken_by_llama_cpp("BF16", 1), tmp_path / "c")
    folder = tmp_path / "c" / "tokenizer"
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert config["add_bos_token"] is False
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"bos_token_id": 2, "eos_token_id": 3}


def test_a_hugging_face_tokenizer_can_be_given_instead(
    taken_by_llama_cpp: Callable[[str, int], Path], tmp_path: Path
) -> None:
    convert(taken_by_llama_cpp("BF16", 1), tmp_path / "c", tokenizer=SMALL_MODEL)
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "c" / "tokenizer" / name).read_bytes() == (SMALL_MODEL / name).read_bytes()


Change = Callable[[dict[str, Any], list[Any]], None]


def _set(key: str, kind: int, value: Any) -> Change:
    return lambda metadata, _: metadata.__setitem__(key, (kind, value))


def _drop(key: str) -> Change:
    return lambda metadata, _: metadata.__delitem__(key)


REFUSED: list[tuple[Change, str]] = [
    (_set("general.architecture", gguf_files.STRING, "llama"), "'nemotron'"),
    (_set("nemotron.attention.head_count", gguf_files.U32, 7), "7"),
    (_set("nemotron.attention.head_count_kv", gguf_files.U32, 3), "3"),
    (_set("nemotron.context_length", gguf_files.U32, 0), "max_position_embeddings"),
    (_set("nemotron.vocab_size", gguf_files.U32, 1023), "1024 pieces"),
    (_set("nemotron.block_count", gguf_files.U32, 5), "model.layers.4"),
    (_set("nemotron.block_count", gguf_files.U32, 2**31 - 1), "layers"),
    (_set("nemotron.attention.layer_norm_epsilon", gguf_files.F32, float("nan")), "norm_eps"),
    (_set("nemotron.rope.scaling.type", gguf_files.STRING, "linear"), "linear"),
    (_set("nemotron.rope.dimension_count", gguf_files.U32, 15), "rotated"),
    (_set("nemotron.embedding_length", gguf_files.STRING, "big"), "cannot be"),
    (_drop("nemotron.feed_forward_length"), "feed_forward_length"),
    (_drop("tokenizer.ggml.model"), "--tokenizer"),
    (_set("tokenizer.ggml.model", gguf_files.STRING, "gpt2"), "--tokenizer"),
    (_drop("tokenizer.ggml.scores"), "scores"),
    (_set("tokenizer.ggml.eos_token_id", gguf_files.U32, 1024), "eos_token_id"),
    (_set("general.alignment", gguf_files.U32, 24), "alignment"),
    (lambda _, tensors: tensors.pop(3), "lacks"),
    (lambda _, tensors: tensors.append(("blk.0.attn_q.bias", (256,), 0, bytes(1024))), "self_attn.q_proj.bias"),
    (lambda _, tensors: tensors.append(tensors[0]), "twice"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_no_usable_nemotron_is_refused(change: Change, said: str, tmp_path: Path) -> None:
    metadata, tensors = gguf_files.metadata_of(SMALL_MODEL), gguf_files.tensors_of(SMALL_MODEL, "BF16")
    change(metadata, tensors)
    gguf_files.write(tmp_path / "changed.gguf", metadata, tensors)
    with pytest.raises(ModelError, match=r"changed\.gguf") as caught:
        convert(tmp_path / "changed.gguf", tmp_path / "c")
    assert said in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    metadata, tensors = gguf_files.metadata_of(SMALL_MODEL), gguf_files.tensors_of(SMALL_MODEL, "BF16")
    name, shape, kind, data = tensors[0]
    tensors[0] = (name, shape, kind, b"\xff\x7f" + data[2:])
    gguf_files.write(tmp_path / "nan.gguf", metadata, tensors)
    with pytest.raises(ModelError, match="NaN"):
        convert(tmp_path / "nan.gguf", tmp_path / "c")


def test_split_files_must_be_whole_and_begun_at_the_first(
    taken_by_llama_cpp: Callable[[str, int], Path], tmp_path: Path
) -> None:
    parts = sorted(gguf_files.file_and_parts(taken_by_llama_cpp("F32", 3)))
    with pytest.raises(ModelError, match="name the first one"):
        convert(parts[1], tmp_path / "c")
    for part in parts[:2]:
        (tmp_path / part.name).write_bytes(part.read_bytes())
    with pytest.raises(ModelError, match="part 3 of 3"):
        convert(tmp_path / parts[0].name, tmp_path / "c")
    (tmp_path / parts[2].name).write_bytes(parts[1].read_bytes())
    with pytest.raises(ModelError, match="says that it is part 1"):
        convert(tmp_path / parts[0].name, tmp_path / "c")
    (tmp_path / "renamed.gguf").write_bytes(parts[0].read_bytes())
    with pytest.raises(ModelError, match="its name does not"):
        convert(tmp_path / "renamed.gguf", tmp_path / "c")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_agree_with_llama_cpps_under_the_same_prefix(kind: str, tmp_path: Path) -> None:
    """llama.cpp quantises activations to 8 bits too, so that close calls may go either way; others may not."""
    from minitron_build.engines.openvino import write
    from minitron_build.evaluate.running import RunningEngine

    convert(DATA / "gguf" / f"tiny-{kind}.gguf", tmp_path / "c")
    write.build(tmp_path / "c", tmp_path / "e", write.CpuOptions())
    engine = RunningEngine(tmp_path / "e")
    same = []
    for prompt, best, gaps in zip(TINY["prompts"], TINY["best"][kind], TINY["gaps"][kind], strict=True):
        rows = np.concatenate([rows for rows, _ in engine.predictions(np.array([*prompt, 0]))])
        agree = rows.argmax(axis=-1) == np.array(best)
        assert max(np.array(gaps)[~agree], default=0) < 0.1, "differs where llama.cpp's choice was clear"
        same += agree.tolist()
    assert len(same) == 512
    assert np.mean(same) >= 0.95


def test_inspect_lists_metadata_tensors_types_and_bits() -> None:
    path = DATA / "gguf" / "tiny-Q4_K_M.gguf"
    found = json.loads(minitron("inspect", path, "--json").stdout)
    reader = gguf.GGUFReader(path)
    assert {tensor["name"]: (tensor["type"], tensor["bytes"]) for tensor in found["tensors"]} == {
        tensor.name: (tensor.tensor_type.name, tensor.n_bytes) for tensor in reader.tensors
    }
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert found["bits_per_weight"] == pytest.approx(8 * sum(int(t.n_bytes) for t in reader.tensors) / weights)
    assert {tensor["bits_per_weight"] for tensor in found["tensors"] if tensor["type"] == "Q4_K"} == {4.5}
    assert found["metadata"]["nemotron.embedding_length"] == 256
    shown = minitron("inspect", path).stdout
    assert "blk.0.attn_q.weight" in shown
    assert "nemotron.context_length" in shown
