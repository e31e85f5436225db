"""Random NemotronForCausalLM models of any shape, as Hugging Face folders, in bounded memory.

They stand in for weights that cannot be downloaded: same files, names, types and magnitudes, no meaning. Every tensor
is read from one cyclic pool of random numbers, so that 8 GB are written as fast as the disk takes them; the length of
the pool is prime and longer than any row, so that no two rows of a matrix are equal. The same arguments give the same
bytes.

    python models/random_model.py --output out/random-4b --shape minitron-4b
    python models/random_model.py --output out/odd --hidden-size 384 --heads 6 --kv-heads 2 --vocab-size 1999 \\
        --intermediate-size 640 --layers 3 --rotary-share 0.25 --rope-theta 50000 --seed 7
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import tokenizer_files
from minitron.errors import MinitronError
from minitron.files import new_folder
from minitron.model.shape import ModelShape, from_config

SMALL_MINITRON = Path(__file__).parent / "small-minitron"

SHAPES = {
    "minitron-4b": ModelShape(
        vocab_size=256000, hidden_size=3072, intermediate_size=9216, num_layers=32, num_heads=24, num_kv_heads=8,
        max_positions=4096, norm_epsilon=1e-5, rotary_share=0.5, rotary_base=10000.0, tied_embeddings=False,
        dtype="bfloat16",
    ),
    "1b": ModelShape(
        vocab_size=128000, hidden_size=2048, intermediate_size=5632, num_layers=16, num_heads=16, num_kv_heads=4,
        max_positions=4096, norm_epsilon=1e-5, rotary_share=0.5, rotary_base=10000.0, tied_embeddings=False,
        dtype="bfloat16",
    ),
    "tiny": ModelShape(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2,
        max_positions=512, norm_epsilon=1e-5, rotary_share=0.5, rotary_base=10000.0, tied_embeddings=False,
        dtype="bfloat16",
    ),
}  # fmt: skip

_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_SAFETENSORS_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_POOL_LENGTH = 4_194_301  # a prime
_SHARD_BYTES = 5_000_000_000  # what transformers itself starts a new file at
_NORM_WEIGHT_SPREAD, _NORM_BIAS_SPREAD = 0.1, 0.05


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to write: its Hugging Face name, its shape and the standard deviation of its elements."""

    name: str
    shape: tuple[int, ...]
    spread: float

    @property
    def length(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tensors(shape: ModelShape) -> Iterator[Tensor]:
    """List the tensors of a NemotronForCausalLM (names of transformers' modeling_nemotron.py), in model order."""
    hidden, inner, kv = shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_size
    spread = 1 / math.sqrt(hidden)  # keeps activations and logits around 1, whatever the size

    def norm(name: str) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (hidden,), _NORM_WEIGHT_SPREAD)  # LayerNorm1P stores weight - 1
        yield Tensor(f"{name}.bias", (hidden,), _NORM_BIAS_SPREAD)

    yield Tensor("model.embed_tokens.weight", (shape.vocab_size, hidden), spread)
    for i in range(shape.num_layers):
        layer = f"model.layers.{i}"
        yield from norm(f"{layer}.input_layernorm")
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield Tensor(f"{layer}.self_attn.{name}_proj.weight", (rows, hidden), spread)
        yield from norm(f"{layer}.post_attention_layernorm")
        yield Tensor(f"{layer}.mlp.up_proj.weight", (inner, hidden), spread)
        yield Tensor(f"{layer}.mlp.down_proj.weight", (hidden, inner), spread)
    yield from norm("model.norm")
    if not shape.tied_embeddings:
        yield Tensor("lm_head.weight", (shape.vocab_size, hidden), spread)


def write_random_model(
    output: Path,
    shape: ModelShape,
    *,
    seed: int = 0,
    shards: int | None = None,
    tokenizer: bool = True,
    spelling: int = 4,
    force: bool = False,
) -> None:
    """Write a Hugging Face folder with random weights of ``shape`` (its ``dtype``; bfloat16 where that is None).

    ``shards`` is the number of safetensors files (None: as many as 5 GB each makes), ``spelling`` the major version
    of transformers whose config.json is written. With ``tokenizer``, the small Minitron's tokenizer comes along,
    filled up to ``shape.vocab_size``.

    Raises ModelError for a shape that cannot be, TokenizerTooLarge, OutputExists, NoSpace, OutputError.
    """
    shape = dataclasses.replace(shape, dtype=shape.dtype or "bfloat16")
    config = hugging_face_config(shape, spelling)
    from_config(config, "the shape asked for")
    needed = shape.parameters * _item_bytes(shape)
    with new_folder(output, force=force, needed_bytes=needed) as folder:
        _write_json(folder / "config.json", config)
        _write_json(
            folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 3}
        )
        if tokenizer:
            tokenizer_files.fill(SMALL_MINITRON, folder, shape.vocab_size)
        _write_weights(folder, shape, seed, shards or math.ceil(needed / _SHARD_BYTES))


def hugging_face_config(shape: ModelShape, spelling: int = 4) -> dict[str, Any]:
    """Spell a config.json for ``shape`` as transformers 4 or 5 does."""
    config: dict[str, Any] = {
        "architectures": ["NemotronForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "head_dim": shape.head_size,
        "hidden_act": "relu2",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.0134,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": False,
        "model_type": "nemotron",
        "norm_eps": shape.norm_epsilon,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "tie_word_embeddings": shape.tied_embeddings,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }
    rotary = {"partial_rotary_factor": shape.rotary_share, "rope_theta": shape.rotary_base}
    if spelling == 4:
        return config | rotary | {"torch_dtype": shape.dtype}
    return config | {"rope_parameters": rotary | {"rope_type": "default"}, "dtype": shape.dtype}


def _write_weights(folder: Path, shape: ModelShape, seed: int, shards: int) -> None:
    pool = np.random.default_rng(seed).standard_normal(_POOL_LENGTH, dtype=np.float32)
    files = _split(list(tensors(shape)), shards)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = ["model.safetensors"]
    for name, members in zip(names, files, strict=True):
        with open(folder / name, "wb") as file:
            _write_safetensors(file, members, shape, pool, seed)
    if len(files) > 1:
        weight_map = {tensor.name: name for name, members in zip(names, files, strict=True) for tensor in members}
        total = shape.parameters * _item_bytes(shape)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _split(members: list[Tensor], shards: int) -> list[list[Tensor]]:
    """Cut the list into at most ``shards`` runs of about equal size."""
    total = sum(tensor.length for tensor in members)
    files: dict[int, list[Tensor]] = {}
    start = 0
    for tensor in members:
        files.setdefault(start * shards // total, []).append(tensor)
        start += tensor.length
    return list(files.values())


def _write_safetensors(
    file: BinaryIO, members: list[Tensor], shape: ModelShape, pool: NDArray[np.float32], seed: int
) -> None:
    """Write one file in the safetensors format: length of the header, the header in JSON, the elements."""
    item = _item_bytes(shape)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in members:
        start, end = end, end + tensor.length * item
        dtype = _SAFETENSORS_NAMES[str(shape.dtype)]
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    scaled: dict[float, NDArray[Any]] = {}
    for tensor in members:
        if tensor.spread not in scaled:
            scaled[tensor.spread] = (pool * np.float32(tensor.spread)).astype(_DTYPES[str(shape.dtype)])
        start = zlib.crc32(f"{seed} {tensor.name}".encode()) % _POOL_LENGTH
        _write_cyclic(file, scaled[tensor.spread], start, tensor.length)


def _write_cyclic(file: BinaryIO, pool: NDArray[Any], start: int, count: int) -> None:
    raw = pool.view(np.uint8)
    item = pool.itemsize
    while count:
        piece = min(count, len(pool) - start)
        file.write(raw[start * item : (start + piece) * item].data)
        count -= piece
        start = 0


def _item_bytes(shape: ModelShape) -> int:
    return _DTYPES[str(shape.dtype)].itemsize


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write a random NemotronForCausalLM model as a Hugging Face folder.")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="start from this shape (%(default)s)")
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--intermediate-size", type=int)
    parser.add_argument("--layers", type=int, dest="num_layers")
    parser.add_argument("--heads", type=int, dest="num_heads")
    parser.add_argument("--kv-heads", type=int, dest="num_kv_heads")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--max-positions", type=int)
    parser.add_argument("--norm-epsilon", type=float)
    parser.add_argument("--rotary-share", type=float, help="part of each head that is rotated, in (0, 1]")
    parser.add_argument("--rope-theta", type=float, dest="rotary_base")
    parser.add_argument("--dtype", choices=_DTYPES)
    parser.add_argument("--tied", action="store_true", help="no head of its own: the embedding is used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, help="number of safetensors files (default: one for each 5 GB)")
    parser.add_argument("--spelling", type=int, choices=(4, 5), default=4, help="config.json of this transformers")
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer's files out")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    return parser


def main() -> int:
    """Read the command line, write the model, return the exit code."""
    args = _parser().parse_args()
    fields = {field.name for field in dataclasses.fields(ModelShape)}
    given = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    shape = dataclasses.replace(SHAPES[args.shape], tied_embeddings=args.tied, **given)
    try:
        write_random_model(
            args.output, shape, seed=args.seed, shards=args.shards, tokenizer=not args.no_tokenizer,
            spelling=args.spelling, force=args.force,
        )  # fmt: skip
    except MinitronError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
