"""``minitron convert`` as a function: a model in, a checkpoint folder out, complete or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron import files
from minitron.artifacts import manifest
from minitron.artifacts.manifest import FileRecord, Input, Manifest
from minitron.console import Progress
from minitron.errors import ModelError, UsageError
from minitron.model import tokenizer_files
from minitron.model.activations import Activations
from minitron.model.precision import AUTO, DTYPES, WRITTEN, Precision, resolved
from minitron.model.shape import ModelShape
from minitron_build.checkpoint.calibration.calibrate import calibrate
from minitron_build.checkpoint.calibration.text import CalibrationText, Ids
from minitron_build.checkpoint.plan import PlannedTensor, plan_rank
from minitron_build.checkpoint.spec import Spec
from minitron_build.checkpoint.values import DTYPES as ARRAY_DTYPES
from minitron_build.checkpoint.values import Calculator
from minitron_build.checkpoint.write import header, threads, write_rank
from minitron_build.sources import huggingface
from minitron_build.sources.model import Source
from minitron_build.sources.opening import open_model

log = logging.getLogger(__name__)

_SMALL_FILES_BYTES = 1 << 20
_HASHED_AT_ONCE_BYTES = 4 << 20


@dataclass(frozen=True)
class Conversion:
    """What was done: the checkpoint's folder and manifest, how many tensors, bytes before and after, how long."""

    folder: Path
    manifest: Manifest
    tensors: int
    source_bytes: int
    checkpoint_bytes: int
    seconds: float


def convert(
    model: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    precision: str = AUTO,
    dtype: str = AUTO,
    tp: int = 1,
    pp: int = 1,
    use_parallel_embedding: bool = False,
    embedding_sharding_dim: int = 0,
    quantize_at_build: bool = False,
    group_size: int | None = None,
    kv_cache: str = AUTO,
    calibration: CalibrationText | None = None,
    tokenizer: str | Path | None = None,
    measured: Activations | None = None,
    force: bool = False,
) -> Conversion:
    """Turn ``model`` (a folder, a GGUF file or a Hugging Face id) into the TensorRT-LLM checkpoint ``output``.

    ``precision``: "auto" or a value of ``Precision``; ``dtype``: "auto", "float16" or "bfloat16", for the weight-only
    precisions. "auto" is what the model's config.json says, float16 for float32 or silence, as the official converter
    has it. ``group_size``: inputs that share a scale, for the 4-bit precisions (128 for int4_awq unless given).
    ``kv_cache``: "auto" or "int8". ``calibration``: the text that int4_awq and an int8 KV cache need; what it finds
    waits in ``OUTPUT.calibration`` until the checkpoint is whole, so that a run that was ended goes on. ``tokenizer``:
    folder of a tokenizer to take instead of the model's own. ``measured``: its activations,
    which the manifest keeps for the plan of an engine.

    Raises UsageError, ModelError, InputError (a tokenizer that cannot be served), OutputError and, when the disk cannot
    hold the result, NoSpace.
    """
    started = time.monotonic()
    output = Path(output)
    _refuse_to_replace_the_model(Path(model), output)
    arguments = {
        "model": str(model), "revision": revision, "precision": precision, "dtype": dtype, "tp": tp, "pp": pp,
        "use_parallel_embedding": use_parallel_embedding, "embedding_sharding_dim": embedding_sharding_dim,
        "quantize_at_build": quantize_at_build, "tokenizer": None if tokenizer is None else str(tokenizer),
        "group_size": group_size, "kv_cache": kv_cache, "calibration": calibration.about() if calibration else None,
    }  # fmt: skip
    source = open_model(str(model), revision)
    try:
        chosen, kept = _resolve(source.shape(), precision, dtype)
        spec = Spec(source.shape(), chosen, kept, tp, pp, use_parallel_embedding, embedding_sharding_dim,
                    quantize_at_build, group_size or chosen.default_group_size,
                    None if kv_cache == AUTO else kv_cache.upper())  # fmt: skip
        found = _tokenizer(source, tokenizer)
        ids = _calibration_ids(spec, calibration, found)
        record, tensors = _convert(source, spec, found, output, arguments, ids=ids, measured=measured, force=force)
        before = sum(file.size for file in record.input.files.values())
    finally:
        source.close()
    after = sum(file.size for file in record.files.values())
    return Conversion(output, record, tensors, before, after, time.monotonic() - started)


def _resolve(shape: ModelShape, precision: str, dtype: str) -> tuple[Precision, str]:
    """What is asked for, with "auto" resolved; raises UsageError for names that are not known."""
    if precision not in (AUTO, *(kind.value for kind in WRITTEN)):
        known = ", ".join(kind.value for kind in WRITTEN)
        raise UsageError(f"precision {precision!r} is not known; take {AUTO}, {known}")
    if dtype not in (AUTO, *DTYPES):
        raise UsageError(f"dtype {dtype!r} is not known; take {AUTO}, {', '.join(DTYPES)}")
    found, kept = resolved(precision, dtype, shape.dtype)
    return Precision(found), kept


def _refuse_to_replace_the_model(model: Path, output: Path) -> None:
    output, model = output.resolve(), model.resolve()
    if output in (model, *model.parents, Path.cwd(), *Path.cwd().parents):
        raise UsageError(f"--output {output} holds the model or the working directory; choose another folder")


def _calibration_ids(spec: Spec, text: CalibrationText | None, tokenizer: dict[str, bytes]) -> Ids | None:
    """The token ids to calibrate with; None where nothing asks for it."""
    needed = [f"--precision {spec.precision.value}"] if spec.precision is Precision.INT4_AWQ else []
    needed += [f"--kv-cache {spec.kv_cache.lower()}"] if spec.kv_cache else []
    if not needed:
        if text is not None:
            log.warning("--calibration %s is not looked at: nothing that was asked for needs it", text.file)
        return None
    if text is None:
        raise UsageError(
            f"{needed[0]} needs a text like those that will be served: --calibration FILE.txt or FILE.jsonl"
        )
    if tokenizer_files.TOKENIZER not in tokenizer:
        raise UsageError(f"{needed[0]} needs a tokenizer for its calibration text: give --tokenizer DIR")
    shape = spec.shape
    return text.ids(tokenizer[tokenizer_files.TOKENIZER], shape.vocab_size, shape.max_positions)


def _tokenizer(source: Source, folder: str | Path | None) -> dict[str, bytes]:
    """The tokenizer's files: the source's own, or those in ``folder``; opened here, as the server will open them."""
    size, where, ids = source.shape().vocab_size, str(folder or source.path), tokenizer_files.GENERATION_CONFIG
    if folder is None:
        found = source.tokenizer_files()
    else:
        found, own = huggingface.read_tokenizer(Path(folder)), Path(folder) / ids
        found[ids] = own.read_bytes() if own.is_file() else source.generation_config()
    found[ids] = tokenizer_files.usable_ids(found[ids], size, f"{where}/{ids}")
    tokenizer_files.check(found, size, where)
    if folder is not None and tokenizer_files.TOKENIZER not in found:
        raise ModelError(f"--tokenizer {folder} has no {tokenizer_files.TOKENIZER}")
    return found


def _convert(
    source: Source,
    spec: Spec,
    tokenizer: dict[str, bytes],
    output: Path,
    arguments: dict[str, Any],
    *,
    ids: Ids | None,
    measured: Activations | None,
    force: bool,
) -> tuple[Manifest, int]:
    tensors, found, work = source.tensors(), None, output.absolute().with_name(f"{output.name}.calibration")
    plans = [plan_rank(spec, rank) for rank in range(spec.world_size)]
    weight_bytes = sum(planned.nbytes for plan in plans for planned in plan)
    needed = weight_bytes + sum(len(header(plan)) for plan in plans) + sum(map(len, tokenizer.values()))
    with files.new_folder(output, force=force, needed_bytes=needed + _SMALL_FILES_BYTES) as folder:
        (folder / "config.json").write_text(json.dumps(spec.config(), indent=4) + "\n", encoding="utf-8")
        (folder / "tokenizer").mkdir()
        for name, content in tokenizer.items():
            (folder / "tokenizer" / name).write_bytes(content)
        if ids is not None:
            group = spec.group_size if spec.precision is Precision.INT4_AWQ else None
            found = calibrate(tensors, spec.shape, ids, work, dtype=ARRAY_DTYPES[spec.dtype], group=group)
        calculator = Calculator(spec, tensors, calibrated=found)
        inputs, outputs = _write_ranks(source, plans, calculator, folder, weight_bytes)
        made_from = Input(source.kind, source.path, manifest.digest_of(inputs), source.revision, inputs)
        record = manifest.write(
            folder, "checkpoint", made_from,
            arguments=arguments, known_sha256=outputs,
            details=_details(spec, tokenizer, weight_bytes) | _provenance(source) | _measured(measured, made_from)
            | ({} if found is None else {"calibration": found.summary(spec.shape.num_layers)}),
        )  # fmt: skip
    shutil.rmtree(work, ignore_errors=True)
    return record, sum(map(len, plans))


def _provenance(source: Source) -> dict[str, Any]:
    """What had happened to the weights before, where that is known."""
    before = source.provenance()
    types = {"source_types": before.stored_types, "lost_before": list(before.losses)} if before.stored_types else {}
    return types | ({"remarks": list(before.remarks)} if before.remarks else {})


def _measured(activations: Activations | None, made_from: Input) -> dict[str, Any]:
    """The measurement for the manifest; raises UsageError where it is of other weights."""
    if activations is None:
        return {}
    if activations.model not in (None, made_from.digest):
        raise UsageError(
            f"the activations were measured of other files than those of {made_from.path} (digest "
            f"{activations.model[:16]}, not {made_from.digest[:16]}); measure this model"
        )
    return {"activations": activations.document()}


def _details(spec: Spec, tokenizer: dict[str, bytes], weight_bytes: int) -> dict[str, Any]:
    return {
        "precision": spec.precision.value,
        "dtype": spec.dtype,
        "tp": spec.tp,
        "pp": spec.pp,
        "quantize_at_build": spec.quantize_at_build,
        "group_size": spec.group_size,
        "kv_cache": spec.kv_cache,
        "vocab_size": spec.shape.vocab_size,
        "has_tokenizer": tokenizer_files.TOKENIZER in tokenizer,
        "weight_bytes": weight_bytes,
        "shape": asdict(spec.shape),
    }


def _write_ranks(
    source: Source, plans: list[list[PlannedTensor]], calculator: Calculator, folder: Path, weight_bytes: int
) -> tuple[dict[str, FileRecord], dict[str, str]]:
    """Write all ranks' files while the source's are hashed; records of the inputs, hashes of the outputs."""
    pool = ThreadPoolExecutor(threads(), "values")
    hasher, given_up = ThreadPoolExecutor(1, "hash"), threading.Event()
    try:
        hashing = [(name, path, hasher.submit(_record, path, given_up)) for name, path in source.files().items()]
        outputs = {}
        with Progress(weight_bytes, "convert") as progress:
            for rank, plan in enumerate(plans):
                name = f"rank{rank}.safetensors"
                outputs[name] = write_rank(folder / name, plan, calculator, pool, progress.advance)
        return {name: _unchanged(path, record) for name, path, record in hashing}, outputs
    finally:
        given_up.set()  # all is hashed by now, or nobody wants it any more
        pool.shutdown(cancel_futures=True)
        hasher.shutdown(cancel_futures=True)


def _record(path: Path, given_up: threading.Event) -> FileRecord:
    """Hash a file, in pieces so that a conversion that failed or was interrupted ends at once."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while (piece := file.read(_HASHED_AT_ONCE_BYTES)) and not given_up.is_set():
            digest.update(piece)
    return FileRecord.of(path, digest.hexdigest())


def _unchanged(path: Path, record: Future[FileRecord]) -> FileRecord:
    """The record, if the file is still the one that was hashed and converted."""
    if manifest.unchanged({path.name: record.result()}, path.parent):
        return record.result()
    raise ModelError(f"{path} was changed while it was converted; convert again")
