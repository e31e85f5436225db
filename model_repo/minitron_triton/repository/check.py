"""Say what in a finished repository cannot work: rendered again from its manifest, in memory, and compared.

Beyond that a repository is held against itself where a hand may have changed it: parameters that their readers
understand, values that two models share, and the engine's limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minitron import files
from minitron.artifacts import manifest
from minitron.artifacts.problem import Problem, error, warning
from minitron.errors import EngineError, InputError, RepositoryError, UsageError
from minitron.model import chat_template, tokenizer_files
from minitron.text.tokenizer import TextTokenizer
from minitron_triton.repository import config_text, engine_folder, layout, llmapi, parameters, writing
from minitron_triton.repository.differences import differences
from minitron_triton.repository.engine_folder import EngineFacts
from minitron_triton.repository.layout import MODELS
from minitron_triton.repository.options import RepositoryOptions

Configs = Mapping[str, Any]

_LEFTOVER = re.compile(r"\$\{[^}]*\}?|\{\{.*?\}\}|\{%.*?%\}")


#: Parameters that have to be the same in two models, because both do the same work.
_SAME = (
    ("add_special_tokens", "preprocessing", "tensorrt_llm_bls"),
    ("skip_special_tokens", "postprocessing", "tensorrt_llm_bls"),
    ("exclude_input_in_output", "tensorrt_llm", "tensorrt_llm_bls"),
    ("cancellation_check_period_ms", "tensorrt_llm", "tensorrt_llm_bls"),
    ("max_queue_size", "tensorrt_llm", "tensorrt_llm_bls"),
)
_STREAMS = (
    "a stream through the ensemble loses spaces and characters that are split across tokens, and cannot be cancelled; "
    "use tensorrt_llm_bls"
)


def check(folder: Path) -> list[Problem]:
    """Everything that is wrong with (error) or worth knowing about (warning) the repository in ``folder``.

    Raises RepositoryError where there is no repository at all.
    """
    if not folder.is_dir():
        raise RepositoryError(f"{folder} is not a folder; 'minitron render' makes a model repository")
    try:
        made = manifest.read(folder, "repository")
    except InputError as problem:
        raise RepositoryError(str(problem)) from problem
    root = str(made.details.get("root"))
    problems = [*_files(folder, made), *_place(root, contained=made.details.get("image") is not None)]
    if made.details.get("backend") == "llmapi":
        return _without_repeats([*problems, *llmapi.check(folder, root)])
    configs: dict[str, Any] = {}
    for model in MODELS:
        found, config = _config(folder, model, root)
        problems += found
        if config is not None:
            configs[model] = config
    engine, of_engine = _engine(folder)
    problems += of_engine
    problems += _against_manifest(folder, made, configs, engine)
    for model, config in configs.items():
        values = {key: value.string_value for key, value in config.parameters.items()}
        for key, message in parameters.problems(model, values, parameters.BY_MODEL[model]):
            problems.append(error(f"{model}/config.pbtxt", f"parameters {key}", message))
    problems += [*_batches(configs, engine), *_shared_parameters(configs)]
    problems += _edited(configs, engine) if engine else []
    if "ensemble" in configs:
        problems.append(warning("ensemble/config.pbtxt", "", _STREAMS))
    problems += _tokenizer(folder, made.details, engine)
    return _without_repeats(problems)


def _against_manifest(
    folder: Path, made: manifest.Manifest, configs: Configs, engine: EngineFacts | None
) -> Iterator[Problem]:
    """The configs against those that the engine and the options of the manifest give."""
    if engine is None:
        return
    try:
        plan = layout.plan(
            engine, RepositoryOptions(**made.arguments.get("options", {})), root=str(made.details.get("root")),
            add_special_tokens=tokenizer_files.wants_special_tokens(folder / "tokenizer"),
        )  # fmt: skip
    except (InputError, UsageError, TypeError) as problem:
        yield error(manifest.NAME, "options", f"{' '.join(str(problem).split())}; render the repository again")
        return
    for model in plan.models:
        if model.name in configs:
            rendered = config_text.parse(writing.config_of(model, model.name), model.name)
            yield from differences(model.name, configs[model.name], rendered, bundled=engine.is_cpu)


def _parameter(configs: Configs, model: str, key: str) -> str | None:
    config = configs.get(model)
    return config.parameters[key].string_value if config is not None and key in config.parameters else None


def _at(model: str, field: str, message: str) -> Problem:
    return error(f"{model}/config.pbtxt", field, message)


def _batches(configs: Configs, engine: EngineFacts | None) -> Iterator[Problem]:
    """All models take the same batches, which the engine can."""
    sizes = {model: config.max_batch_size for model, config in configs.items()}
    usual = max(sizes.values(), key=list(sizes.values()).count, default=0)
    for model, size in sizes.items():
        if size < 1:
            yield _at(model, "max_batch_size", f"is {size}, and at least 1 is needed: the tensors have a batch axis")
        elif engine is not None and size > engine.max_batch_size:
            yield _at(model, "max_batch_size", f"is {size}, more than the engine's {engine.max_batch_size}")
        elif size != usual:
            yield _at(
                model, "max_batch_size", f"is {size}, and {usual} in the other models: they take the same batches"
            )


def _shared_parameters(configs: Configs) -> Iterator[Problem]:
    for key, one, other in _SAME:
        values = _parameter(configs, one, key), _parameter(configs, other, key)
        if None not in values and values[0] != values[1]:
            yield _at(other, f"parameters {key}", f"is {values[1]!r}, and {values[0]!r} in {one}")


def _edited(configs: Configs, engine: EngineFacts) -> Iterator[Problem]:
    """Choices that may be made by hand, against what the engine can and against each other."""
    mode = _parameter(configs, "tensorrt_llm", "decoding_mode")
    if mode is not None and (mode == "beam_search") != (engine.max_beam_width > 1):
        yield _at("tensorrt_llm", "parameters decoding_mode", f"is {mode!r}, with {engine.max_beam_width} beams")
    chunked = _parameter(configs, "tensorrt_llm", "enable_chunked_context")
    if parameters.is_true(chunked) and not (engine.paged_context or engine.is_cpu):
        yield _at("tensorrt_llm", "parameters enable_chunked_context", "needs an engine built with paged context FMHA")
    reuses = _parameter(configs, "tensorrt_llm", "enable_kv_cache_reuse")
    logits = _parameter(configs, "tensorrt_llm_bls", "context_logits")
    if None not in (reuses, logits) and logits != (right := engine.context_logits(str(reuses))):
        message = f"is {logits!r}, and {right!r} is what the engine gives with enable_kv_cache_reuse {reuses!r}"
        yield _at("tensorrt_llm_bls", "parameters context_logits", message)
    if "tensorrt_llm" in configs and (batcher := configs["tensorrt_llm"].dynamic_batching).HasField(
        "default_queue_policy"
    ):
        size, limit = batcher.default_queue_policy.max_queue_size, _parameter(configs, "tensorrt_llm", "max_queue_size")
        if str(size) != limit:
            field = "dynamic_batching.default_queue_policy.max_queue_size"
            yield _at("tensorrt_llm", field, f"is {size}, and {limit} in parameters max_queue_size")


def _place(root: str, *, contained: bool) -> Iterator[Problem]:
    if why := writing.unbearable(root, contained=contained):
        yield error(manifest.NAME, "root", f"is {root!r}, and that {why}: render into another folder")


def _config(folder: Path, model: str, root: str) -> tuple[list[Problem], Any]:
    """What is wrong with a model's files, and its config if it can be read; ``root``, in it, is a path as it stands."""
    path, where = folder / model / "config.pbtxt", f"{model}/config.pbtxt"
    if not path.is_file():
        return [error(where, "", "is missing: render the repository again")], None
    problems = []
    if not (folder / model / "1").is_dir():
        problems.append(error(f"{model}/1", "", "is missing: Triton loads no model without its version folder"))
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.replace(config_text.quote(root)[1:-1], "").splitlines(), 1):
        if not line.lstrip().startswith("#") and (leftover := _LEFTOVER.search(line)):
            problems.append(error(where, f"line {number}", f"{leftover[0]!r} is a placeholder that nobody filled in"))
    try:
        config = config_text.parse(text, where)
    except RepositoryError as problem:
        return [*problems, error(where, "", " ".join(str(problem).split()))], None
    if config.backend == "python" and not (folder / model / "1" / "model.py").is_file():
        problems.append(error(f"{model}/1/model.py", "", "is missing: it is the model of the backend 'python'"))
    return problems, config


def _files(folder: Path, made: manifest.Manifest) -> Iterator[Problem]:
    """Files against the manifest: the small ones by content, the engine's by size."""
    for name, record in made.files.items():
        path = folder / name
        if not path.is_file():
            yield error(name, "", "is missing, and it was there when the repository was rendered")
        elif path.stat().st_size != record.size and name.startswith("engine/"):
            yield error(name, "", f"has {path.stat().st_size} bytes, and {record.size} were rendered: another engine")
        elif not name.startswith("engine/") and files.sha256_file(path) != record.sha256:
            changed = "is not the file that was rendered"
            if name.startswith("tokenizer/"):
                yield error(name, "", f"{changed}: it may be the tokenizer of another model; render again")
            else:
                yield warning(name, "", f"{changed}: it was edited since")


def _engine(folder: Path) -> tuple[EngineFacts | None, list[Problem]]:
    try:
        details = json.loads((folder / "engine" / manifest.NAME).read_text(encoding="utf-8")).get("details", {})
    except (OSError, ValueError, AttributeError):
        details = {}
    try:
        return engine_folder.read(folder / "engine", details), []
    except EngineError as problem:
        return None, [error("engine/config.json", "", str(problem).replace(str(folder) + "/", ""))]


def _tokenizer(repository: Path, details: Mapping[str, Any], engine: EngineFacts | None) -> Iterator[Problem]:
    """The tokenizer against the engine and against what was rendered, opened as the server opens it."""
    where, folder = "tokenizer/tokenizer.json", repository / "tokenizer"
    if found := chat_template.problem(tokenizer_files.read(folder)):
        yield error(f"tokenizer/{found[0]}", "chat_template", f"is broken: {found[1]}")
    if engine:
        try:
            tokenizer_files.check_end_ids(folder, engine.vocab_size)
        except EngineError as problem:
            message = str(problem).replace(str(repository) + "/", "")
            yield error("tokenizer/generation_config.json", "eos_token_id", message)
    try:
        names = tokenizer_files.present(folder)
        size = tokenizer_files.vocabulary_size(folder)
        tokenizer_files.check({name: (folder / name).read_bytes() for name in names}, size or 0, str(folder))
        TextTokenizer(str(folder))  # as the server does
    except (InputError, ValueError) as problem:
        yield error(where, "", str(problem).replace(str(repository) + "/", ""))
        return
    rendered = details.get("tokenizer_vocab_size")
    if size != rendered:
        yield error(where, "vocab", f"knows {size} tokens, and the one that was rendered {rendered}: another tokenizer")
    if engine and size is not None and size > engine.vocab_size:
        yield error(where, "vocab", f"has ids up to {size - 1}, and the engine knows {engine.vocab_size} tokens")


def _without_repeats(problems: list[Problem]) -> list[Problem]:
    """Errors first; the remark that a file was edited goes where an error says what is wrong in it."""
    named = {problem.file for problem in problems if problem.is_error}
    kept = [f for f in problems if f.is_error or f.file not in named or not f.message.endswith("edited since")]
    return sorted(dict.fromkeys(kept), key=lambda problem: not problem.is_error)
