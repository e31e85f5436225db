"""Read a finished repository and say what in it cannot work. Knows the folder, Triton's protobuf and the contract of
the models (``tensors``, ``parameters``, ``ensemble``), not how a repository is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron import files
from minitron.artifacts import manifest
from minitron.artifacts.problem import Problem, error, warning
from minitron.errors import EngineError, InputError, RepositoryError
from minitron.model import chat_template, tokenizer_files
from minitron.text.tokenizer import TextTokenizer
from minitron_triton.repository import check_config, check_together, config_text, engine_folder, llmapi, writing
from minitron_triton.repository.engine_folder import EngineFacts
from minitron_triton.repository.layout import MODELS

_LEFTOVER = re.compile(r"\$\{[^}]*\}?|\{\{.*?\}\}|\{%.*?%\}")


@dataclass(frozen=True)
class Contents:
    """What was found in a repository folder; ``configs`` by model, those that could be read."""

    folder: Path
    details: dict[str, Any]
    configs: dict[str, Any]
    engine: EngineFacts | None


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
    contents = Contents(folder, made.details, configs, engine)
    for model, config in configs.items():
        problems += check_config.check(model, config, engine)
    problems += check_together.check(contents.configs, engine, made.details)
    problems += _tokenizer(contents)
    return _without_repeats(problems)


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


def _tokenizer(contents: Contents) -> Iterator[Problem]:
    """The tokenizer against the engine and against what was rendered, opened as the server opens it."""
    where, folder = "tokenizer/tokenizer.json", contents.folder / "tokenizer"
    if found := chat_template.problem(tokenizer_files.read(folder)):
        yield error(f"tokenizer/{found[0]}", "chat_template", f"is broken: {found[1]}")
    if contents.engine:
        try:
            tokenizer_files.check_end_ids(folder, contents.engine.vocab_size)
        except EngineError as problem:
            message = str(problem).replace(str(contents.folder) + "/", "")
            yield error("tokenizer/generation_config.json", "eos_token_id", message)
    try:
        names = tokenizer_files.present(folder)
        size = tokenizer_files.vocabulary_size(folder)
        tokenizer_files.check({name: (folder / name).read_bytes() for name in names}, size or 0, str(folder))
        TextTokenizer(str(folder))  # as the server does
    except (InputError, ValueError) as problem:
        yield error(where, "", str(problem).replace(str(contents.folder) + "/", ""))
        return
    rendered = contents.details.get("tokenizer_vocab_size")
    if size != rendered:
        yield error(where, "vocab", f"knows {size} tokens, and the one that was rendered {rendered}: another tokenizer")
    if contents.engine and size is not None and size > contents.engine.vocab_size:
        yield error(
            where, "vocab", f"has ids up to {size - 1}, and the engine knows {contents.engine.vocab_size} tokens"
        )


def _without_repeats(problems: list[Problem]) -> list[Problem]:
    """Errors first; the remark that a file was edited goes where an error says what is wrong in it."""
    named = {problem.file for problem in problems if problem.is_error}
    kept = [f for f in problems if f.is_error or f.file not in named or not f.message.endswith("edited since")]
    return sorted(dict.fromkeys(kept), key=lambda problem: not problem.is_error)
