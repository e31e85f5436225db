"""Safetensors files and config.json from hostile hands: an error of ours, always, and soon; never a wrong tensor.

What is well-formed is decided by the safetensors library, which reads the same bytes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from conftest import DATA
from minitron.errors import InputError, MinitronError, ModelError
from minitron_build.checkpoint.convert import convert
from minitron_build.sources.safetensors import SafetensorsFile

HF = DATA / "golden" / "trtllm_checkpoint" / "a" / "hf"
CONFIG: dict[str, Any] = json.loads((HF / "config.json").read_text())
WEIGHTS = (HF / "model.safetensors").read_bytes()
HEADER_END = 8 + int.from_bytes(WEIGHTS[:8], "little")
HEADER: dict[str, Any] = json.loads(WEIGHTS[8:HEADER_END])


def _file(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def _open(content: bytes) -> dict[str, bytes]:
    """All tensors' bytes as our reader gives them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        with SafetensorsFile(path) as file:
            return {name: file.rows(name).tobytes() for name, entry in file.entries.items() if entry.shape}


def _library(content: bytes) -> dict[str, bytes]:
    """The same as the safetensors library gives them."""
    read: Any = deserialize
    return {name: bytes(entry["data"]) for name, entry in read(content)}


def test_a_good_file_is_read_as_the_library_reads_it() -> None:
    found = _open(WEIGHTS)
    assert found == _library(WEIGHTS)


def test_some_rows_are_those_of_the_whole() -> None:
    with SafetensorsFile(HF / "model.safetensors") as file:
        whole = file.rows("lm_head.weight")
        assert np.array_equal(file.rows("lm_head.weight", 7, 19), whole[7:19])


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is truncated"),
        (_file(b"{}", b"", 1 << 40), "is truncated"),
        (_file(b"[]", b""), "no JSON object"),
        (_file(b"{", b""), "no JSON"),
        (_file(b"[" * 100_000, b""), "no JSON"),
        (_file(b"\xff{}", b""), "no JSON"),
        (_file(json.dumps({"a": ONE}).encode(), b"1234567"), "is truncated"),
        (_file(json.dumps({"a": ONE}).encode(), b"123456789"), "after its last tensor"),
        (_file(json.dumps({"a": ONE, "b": ONE}).encode(), b"12345678"), "overlaps"),
        (_file(json.dumps({"a": ONE | {"data_offsets": [8, 16]}}).encode(), b"1" * 16), "leaves a gap"),
        (_file(json.dumps({"a": ONE | {"shape": [3]}}).encode(), b"12345678"), "has data_offsets"),
        (_file(json.dumps({"a": ONE | {"shape": [-2, -1]}}).encode(), b"12345678"), "has shape"),
        (_file(json.dumps({"a": ONE | {"shape": [True, 2]}}).encode(), b"12345678"), "has shape"),
        (_file(json.dumps({"a": ONE | {"dtype": "F33"}}).encode(), b"12345678"), "unknown dtype"),
        (_file(json.dumps({"a": ONE | {"shape": [1 << 62] * 8}}).encode(), b"12345678"), "has data_offsets"),
        (_file(b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2), b"12345678"), "occurs twice"),
    ],
)
def test_what_is_wrong_is_named(content: bytes, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        _open(content)
    if words != "occurs twice":  # there the library takes the last one; otherwise it agrees
        with pytest.raises(SafetensorError):
            _library(content)


HOSTILE_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=5), st.builds(dict),
    st.lists(st.integers(-3, 1 << 66), max_size=4),
)  # fmt: skip


@settings(max_examples=150, deadline=2000)
@given(data=st.data())
def test_a_mutated_header_is_refused_or_means_what_the_library_says(data: st.DataObject) -> None:
    header = json.loads(json.dumps(HEADER))
    name = data.draw(st.sampled_from([key for key in header if key != "__metadata__"]))
    for _ in range(data.draw(st.integers(1, 3))):
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "other", None]))
        value = data.draw(HOSTILE_VALUES)
        if field is None:
            header[name] = value
        elif isinstance(header[name], dict):
            header[name][field] = value
    content = _file(json.dumps(header).encode(), WEIGHTS[HEADER_END:])
    _same_verdict(content)


@settings(max_examples=150, deadline=2000)
@given(
    position=st.integers(0, HEADER_END + 10), junk=st.binary(max_size=12), cut=st.integers(0, 200),
    end=st.integers(0, len(WEIGHTS)) | st.just(len(WEIGHTS)),
)  # fmt: skip
def test_mutated_bytes_are_refused_or_mean_what_the_library_says(
    position: int, junk: bytes, cut: int, end: int
) -> None:
    _same_verdict((WEIGHTS[:position] + junk + WEIGHTS[position + cut :])[:end])


def _same_verdict(content: bytes) -> None:
    """We may be stricter than the library, never laxer, and never read other bytes."""
    try:
        found = _open(content)
    except InputError:
        return
    assert found.items() <= _library(content).items()


@settings(max_examples=150, deadline=5000)
@given(
    changes=st.dictionaries(
        st.sampled_from([*CONFIG, "rope_parameters", "rope_scaling", "dtype", "rope_percent"]),
        HOSTILE_VALUES | st.integers(1, 300) | st.dictionaries(st.sampled_from(["rope_theta", "type"]), HOSTILE_VALUES),
        min_size=1, max_size=3,
    ),
    precision=st.sampled_from(["auto", "float16", "int8_weight_only", "int4_weight_only"]),
)  # fmt: skip
def test_a_mutated_config_converts_or_is_refused(changes: dict[str, Any], precision: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        (model / "model.safetensors").symlink_to(HF / "model.safetensors")
        (model / "config.json").write_text(json.dumps(CONFIG | changes))
        try:
            convert(model, Path(folder) / "out", precision=precision)
        except MinitronError as error:
            assert str(error)
            assert not (Path(folder) / "out").exists()
