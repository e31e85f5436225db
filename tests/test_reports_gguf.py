"""GGUF files: keys that change the answer, and files that are not what their name says.

Right is what llama.cpp does (``src/llama-vocab.cpp``, ``src/llama-model.cpp``), which is asked about the ends itself in
``make test-reference``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import gguf_files
from conftest import DATA, SMALL_MODEL, minitron
from gguf_files import ARRAY, BOOL, F32, I32, STRING, U32
from minitron.errors import InputError, ModelError
from minitron_build.checkpoint.convert import convert
from minitron_build.sources.gguf import GgufModel
from minitron_build.sources.opening import open_model

KEY = "tokenizer.ggml"
END, NORMAL_TYPE, CONTROL_TYPE = 3, 1, 3  # </s>; gguf's TokenType
Metadata = dict[str, Any]


def renamed(names: dict[int, str]) -> Callable[[Metadata], None]:
    """Give pieces of the small Minitron's vocabulary other texts."""

    def change(metadata: Metadata) -> None:
        _, (kind, pieces) = metadata[f"{KEY}.tokens"]
        pieces = [names.get(i, piece) for i, piece in enumerate(pieces)]
        metadata[f"{KEY}.tokens"] = (ARRAY, (kind, pieces))

    return change


def keys(**values: Any) -> Callable[[Metadata], None]:
    """Set token ids by the name before ``_token_id``; None takes a key away."""

    def change(metadata: Metadata) -> None:
        for name, value in values.items():
            metadata.pop(f"{KEY}.{name}_token_id", None)
            if value is not None:
                metadata[f"{KEY}.{name}_token_id"] = (U32, value)

    return change


@dataclass(frozen=True)
class Ends:
    """Which tokens end a text, and which of them are special by their text."""

    about: str
    source: str
    changes: tuple[Callable[[Metadata], None], ...]
    ends: list[int]
    special: tuple[int, ...] = ()


SITUATIONS = [
    Ends("eos alone", "llama.cpp", (), [END]),
    Ends("a key for the end of a turn", "llama.cpp#9606", (keys(eot=977),), [END, 977]),
    Ends("keys for the end of a turn and of a message", "llama.cpp#9609", (keys(eot=977, eom=5),), [END, 977, 5]),
    Ends("the end of a turn is eos", "llama.cpp", (keys(eot=END),), [END]),
    Ends("the end of a turn by its text", "llama.cpp#9606", (renamed({900: "<|im_end|>"}),), [END, 900], (900,)),
    Ends("two by their text, one by its key", "llama.cpp#9609",
         (renamed({900: "<|eot_id|>", 901: "<end_of_turn>"}), keys(eot=977)), [END, 977, 900, 901], (900, 901)),
    Ends("the end of a message by its text", "llama.cpp", (renamed({900: "<|eom_id|>"}),), [END, 900], (900,)),
    Ends("the end of a file in a repository", "llama.cpp, fill in the middle", (renamed({900: "<|file_sep|>"}),),
         [END, 900], (900,)),
    Ends("the same, where a key names another", "llama.cpp, fill in the middle",
         (renamed({900: "<|file_sep|>"}), keys(fim_sep=977)), [END, 977]),
    Ends("padding of code by its key", "llama.cpp, fill in the middle", (keys(fim_pad=977),), [END, 977]),
    Ends("special, but no end", "llama.cpp, fill in the middle", (renamed({900: "<|fim_prefix|>"}),), [END], (900,)),
    Ends("<|end|> between calls of tools", "llama.cpp, o200k_harmony",
         (renamed({900: "<|end|>", 901: "<|return|>", 902: "<|call|>"}),), [END, 901, 902], (901, 902)),
    Ends("<|end|> without those", "llama.cpp, Phi-3", (renamed({900: "<|end|>"}),), [END, 900], (900,)),
    Ends("eos by its text, where no key names it", "llama.cpp, paddleocr", (keys(eos=None),), [END], (END,)),
]  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a GGUF file of the small Minitron with changed metadata."""

    def make(*changes: Callable[[Metadata], None], name: str = "changed.gguf", tensors: bool = True) -> Path:
        metadata = gguf_files.metadata_of(SMALL_MODEL)
        for change in changes:
            change(metadata)
        gguf_files.write(tmp_path / name, metadata, gguf_files.tensors_of(SMALL_MODEL, "BF16") if tensors else [])
        return tmp_path / name

    return make


def setting(key: str, kind: int, value: Any) -> Callable[[Metadata], None]:
    return lambda metadata: metadata.__setitem__(key, (kind, value))


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda one: one.about)
def test_every_end_is_written_and_special_pieces_are_special(situation: Ends, write: Callable[..., Path]) -> None:
    with GgufModel(write(*situation.changes)) as model:
        files = model.tokenizer_files()
    ids = json.loads(files["generation_config.json"])["eos_token_id"]
    assert ids == (situation.ends if len(situation.ends) > 1 else situation.ends[0])
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    for token in situation.special:
        text = tokenizer.id_to_token(token)
        assert tokenizer.encode(f"the{text}").ids[-1] == token
        assert tokenizer.decode([token]) == ""


@pytest.mark.reference
@pytest.mark.parametrize("situation", SITUATIONS[:-1], ids=lambda one: one.about)
def test_llama_cpp_ends_on_the_same(situation: Ends, write: Callable[..., Path]) -> None:
    """All but the last: the version at hand knows </s> by its key only."""
    import llama_cpp

    model = llama_cpp.LlamaCpp(write(*situation.changes))  # kept: the vocabulary is a pointer into it
    vocabulary = model._model.get_vocab()
    ends = [token for token in range(vocabulary.n_vocab) if vocabulary.is_eog(token)]
    assert ends == sorted(situation.ends)
    assert all(vocabulary.is_control(token) for token in situation.special)


def test_pieces_without_a_text_are_named_as_llama_cpp_names_them(write: Callable[..., Path]) -> None:
    """``[EMPTY_n]``; a name that is there twice is refused, by llama.cpp too."""
    with GgufModel(write(renamed({900: "", 901: ""}))) as model:
        tokenizer = Tokenizer.from_str(model.tokenizer_files()["tokenizer.json"].decode())
    assert [tokenizer.id_to_token(token) for token in (900, 901)] == ["[EMPTY_900]", "[EMPTY_901]"]
    with (
        GgufModel(write(renamed({900: "", 901: "[EMPTY_900]"}))) as model,
        pytest.raises(ModelError, match=r"\[EMPTY_900\]' twice"),
    ):
        model.tokenizer_files()


def test_it_is_said_where_nothing_ends_a_text(
    write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(write(keys(eos=None), renamed({END: "<nothing>"})), tmp_path / "c")
    assert "no token is known to end a text" in caplog.text
    caplog.clear()
    convert(write(), tmp_path / "d")
    assert not caplog.messages


#: Keys that would change the answer. (key, type, value, words of the refusal); sources in docs/gguf.md.
CHANGING: list[tuple[str, int, Any, str]] = [
    ("nemotron.rope.scaling.factor", F32, 2.0, "rope.scaling.factor 2.0"),
    ("nemotron.rope.scale_linear", F32, 4.0, "rope.scaling.factor 4.0"),
    ("nemotron.rope.scaling.attn_factor", F32, 0.5, "attn_factor"),
    ("nemotron.attention.causal", BOOL, False, "attention.causal"),
    ("nemotron.attention.sliding_window", U32, 512, "sliding_window"),
    ("nemotron.attention.value_length", U32, 64, "value_length"),
    ("nemotron.attention.key_length", U32, 64, "64"),
    ("nemotron.attention.clamp_kqv", F32, 8.0, "clamp_kqv"),
    ("nemotron.attention.max_alibi_bias", F32, 8.0, "max_alibi_bias"),
    ("nemotron.attention.scale", F32, 0.1, "attention.scale"),
    ("nemotron.logit_scale", F32, 0.5, "logit_scale"),
    ("nemotron.embedding_scale", F32, 16.0, "embedding_scale"),
    ("nemotron.final_logit_softcapping", F32, 30.0, "final_logit_softcapping"),
    ("nemotron.use_parallel_residual", BOOL, True, "use_parallel_residual"),
    ("nemotron.expert_count", U32, 8, "expert_count"),
    ("nemotron.rope.dimension_sections", ARRAY, (I32, [8, 8, 0, 0]), "dimension_sections"),
    ("nemotron.attention.head_count", ARRAY, (I32, [8, 8, 8, 8]), "cannot be"),
    ("nemotron.embedding_length_out", U32, 128, "embedding_length_out"),
    ("tokenizer.ggml.suppress_tokens", ARRAY, (I32, [5]), "suppress_tokens"),
    ("tokenizer.ggml.eot_token_id", U32, 1024, "eot_token_id"),
]


def _without_scaling_type(metadata: Metadata) -> None:
    del metadata["nemotron.rope.scaling.type"]  # which llama.cpp takes for "linear"


@pytest.mark.parametrize("case", CHANGING, ids=lambda case: case[0])
def test_a_key_that_changes_the_answer_is_refused(
    case: tuple[str, int, Any, str], write: Callable[..., Path], tmp_path: Path
) -> None:
    key, kind, value, words = case
    with pytest.raises(ModelError, match=words):
        convert(write(_without_scaling_type, setting(key, kind, value)), tmp_path / "c")


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("nemotron.rope.scaling.factor", F32, 1.0),
        ("nemotron.attention.key_length", U32, 32),
        ("nemotron.attention.value_length", U32, 32),
        ("nemotron.attention.causal", BOOL, True),
        ("nemotron.attention.layer_norm_rms_epsilon", F32, 1e-6),
        ("nemotron.expert_count", U32, 0),
        ("nemotron.logit_scale", F32, 1.0),
        ("general.file_type", U32, 32),
        ("general.sampling.temp", F32, 0.7),
        ("tokenizer.ggml.mask_token_id", U32, 5),
        ("tokenizer.ggml.suppress_tokens", ARRAY, (I32, [])),
    ],
)
def test_a_key_that_changes_nothing_does_not_matter(
    key: str, kind: int, value: Any, write: Callable[..., Path], tmp_path: Path
) -> None:
    convert(write(), tmp_path / "right")
    done = convert(write(_without_scaling_type, setting(key, kind, value)), tmp_path / "c")
    assert (done.folder / "rank0.safetensors").read_bytes() == (tmp_path / "right/rank0.safetensors").read_bytes()


def test_a_scaling_that_is_none_has_no_factor(write: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp: "never scale if scaling type is none"."""
    convert(write(setting("nemotron.rope.scaling.factor", F32, 2.0)), tmp_path / "c")


# --- what a file is -----------------------------------------------------------------------------------------------


def test_a_gguf_file_is_known_by_its_content(write: Callable[..., Path], tmp_path: Path) -> None:
    """As ik_llama.cpp#605 has it: a blob of a cache has no ending."""
    blob = write(name="sha256-0123")
    convert(blob, tmp_path / "c")
    assert "token_embd.weight" in minitron("inspect", blob).stdout


#: (what, first bytes, words)
FILES: list[tuple[str, bytes, str]] = [
    ("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    ("a file from before GGUF", b"tjgg\x03\0\0\0" + bytes(40), "before GGUF"),
    ("torch's archive", b"PK\x03\x04" + bytes(40), "safe_serialization"),
    ("a web page", b"<!DOCTYPE html><html>", "web page"),
    ("compressed", b"\x1f\x8b\x08" + bytes(40), "unpack"),
    ("nothing that is known", bytes(range(40)), "a model is a folder"),
    ("empty", b"", "a model is a folder"),
]


@pytest.mark.parametrize(("what", "content", "words"), FILES, ids=[what for what, _, _ in FILES])
@pytest.mark.parametrize("name", ["model.gguf", "model.bin"])
def test_what_is_no_gguf_file_is_named(what: str, content: bytes, words: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_model(str(tmp_path / name))


def test_a_safetensors_file_is_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="name the folder"):
        open_model(str(SMALL_MODEL / "model.safetensors"))


@pytest.mark.parametrize(("what", "content", "words"), FILES[:5], ids=[what for what, _, _ in FILES[:5]])
def test_what_is_no_safetensors_file_is_named(what: str, content: bytes, words: str, tmp_path: Path) -> None:
    hf = DATA / "golden" / "trtllm_checkpoint" / "a" / "hf"
    (tmp_path / "config.json").write_bytes((hf / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=rf"model\.safetensors is .*{words}"):
        open_model(str(tmp_path))


def _none(metadata: Metadata) -> None:
    metadata.clear()


#: (what, changes, words): files that llama.cpp's tools write beside models.
NO_MODELS: list[tuple[str, tuple[Callable[[Metadata], None], ...], bool, str]] = [
    ("a LoRA adapter", (setting("general.type", STRING, "adapter"), setting("adapter.type", STRING, "lora")), True,
     "a LoRA adapter"),
    ("an old LoRA adapter", (setting("adapter.type", STRING, "lora"),), True, "a LoRA adapter"),
    ("an importance matrix", (_none, setting("general.type", STRING, "imatrix")), True, "importance matrix"),
    ("a vocabulary", (), False, "vocabulary without weights"),
    ("a vocabulary that says so", (setting("general.type", STRING, "vocab"),), False, "vocabulary without weights"),
    ("a projector", (setting("general.type", STRING, "mmproj"), setting("general.architecture", STRING, "clip")), True,
     "projector"),
]  # fmt: skip


@pytest.mark.parametrize("case", NO_MODELS, ids=lambda case: case[0])
def test_what_is_no_model_says_what_it_is(case: Any, write: Callable[..., Path], tmp_path: Path) -> None:
    _, changes, tensors, words = case
    with pytest.raises(ModelError, match=words):
        convert(write(*changes, tensors=tensors), tmp_path / "c")


def test_a_type_that_is_not_known_is_named_by_its_number(tmp_path: Path) -> None:
    """ik_llama.cpp has types of its own, from 137 on (ik_llama.cpp#605)."""
    metadata, tensors = gguf_files.metadata_of(SMALL_MODEL), gguf_files.tensors_of(SMALL_MODEL, "BF16")
    name, shape, _, data = tensors[0]
    tensors[0] = (name, shape, 137, data)
    gguf_files.write(tmp_path / "own.gguf", metadata, tensors)
    with pytest.raises(ModelError, match="of type 137"):
        convert(tmp_path / "own.gguf", tmp_path / "c")
