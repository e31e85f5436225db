"""Write a model repository: configs from templates, our Python models, the tokenizer and the engine, in one folder."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from minitron_trtllm import compat, files, manifest
from minitron_trtllm.errors import EngineError, InputError, UsageError
from minitron_trtllm.repository import config_text, engine_folder, layout, tokenizer_files
from minitron_trtllm.repository.layout import ModelConfig, Repository
from minitron_trtllm.repository.options import RepositoryOptions
from minitron_trtllm.server import container
from minitron_trtllm.server.launch import Served

ROOM = Path(__file__).parent.parent
TEMPLATES = ROOM / "templates"
PYTHON_MODELS = ROOM / "models"
#: Where a container sees the repository.
CONTAINER_ROOT = "/models"


def render(
    engine: Path,
    output: Path,
    options: RepositoryOptions,
    *,
    root: str | None = None,
    force: bool = False,
    copy: bool = False,
) -> Repository:
    """Render the repository of ``engine`` into the folder ``output``; all of it or, on an error, nothing.

    ``root``: the folder as the server will see it (default: ``output`` itself for a CPU engine, which is served on
    this machine, and /models for a GPU engine, which is served in a container). Engine files are hard links unless
    ``copy`` is set: they take no room, and unlike symbolic links they survive moving either folder. Where a link
    cannot be (another file system) they are copied.

    Raises EngineError, UsageError, OutputError.
    """
    engine, output = Path(os.path.abspath(engine)), Path(os.path.abspath(output))
    made_from, engine_manifest = _input(engine)
    facts = engine_folder.read(engine, engine_manifest.details)
    if not facts.is_cpu:
        built_with = {"tensorrt_llm": facts.version}
        compat.check_engine(built_with, str(engine), compat.image(options.image.rpartition(":")[2]))
    tokenizer = engine / "tokenizer"
    names = tokenizer_files.present(tokenizer)
    size = tokenizer_files.vocabulary_size(tokenizer)
    if size is not None and size > facts.vocab_size:
        raise EngineError(
            f"{tokenizer} has ids up to {size - 1}, and the engine knows {facts.vocab_size}: it is the tokenizer of "
            "another model; convert and build with the right one"
        )
    plan = layout.plan(
        facts, options,
        root=_root(root, output, is_cpu=facts.is_cpu),
        add_special_tokens=tokenizer_files.wants_special_tokens(tokenizer),
    )  # fmt: skip
    engine_files = [name for name in files.tree_files(engine) if not name.startswith("tokenizer/")]
    needed = sum((engine / name).stat().st_size for name in engine_files) if copy else 0
    with files.new_folder(output, force=force, needed_bytes=needed) as folder:
        for model in plan.models:
            _write_model(folder, model)
        for name in names:
            _place(tokenizer / name, folder / "tokenizer" / name, copy=True)
        for name in engine_files:
            _place(engine / name, folder / "engine" / name, copy=copy)
        if not facts.is_cpu:
            command = container.composed(_served(plan, output), exit_timeout_s=60)
            text = _text("docker-compose.yaml.j2", repository=plan, options=options, command=command)
            _write(folder / "docker-compose.yaml", text)
        known = {f"engine/{name}": record.sha256 for name, record in engine_manifest.files.items()}
        manifest.write(
            folder, "repository", made_from,
            arguments={"root": root, "copy": copy, "options": _changed(options)},
            details=_details(plan, str(engine_manifest.details.get("target", "cpu")), size),
            known_sha256=known,
        )  # fmt: skip
    return plan


def _served(plan: Repository, folder: Path) -> Served:
    return Served(
        folder, plan.backend, tuple(model.name for model in plan.models), layout.FRONT, Path(plan.root),
        plan.engine.world_size, plan.options.bls_max_concurrency, plan.options.image,
    )  # fmt: skip


def _input(engine: Path) -> tuple[manifest.Input, manifest.Manifest]:
    try:
        return manifest.input_of(engine, "engine")
    except InputError as error:
        raise EngineError(f"{error}; 'minitron build' makes an engine") from error


def _root(root: str | None, output: Path, *, is_cpu: bool) -> str:
    if root is None:
        return str(output) if is_cpu else CONTAINER_ROOT
    if not root.startswith("/"):
        raise UsageError(f"--root {root} is not absolute, and the server may start in any folder; give an absolute one")
    return root.rstrip("/") or "/"


def _changed(options: RepositoryOptions) -> dict[str, Any]:
    plain = RepositoryOptions()
    return {name: value for name, value in vars(options).items() if value != getattr(plain, name)}


def _details(plan: Repository, target: str, tokenizer_vocab_size: int | None) -> dict[str, Any]:
    engine = plan.engine
    return {
        "backend": plan.backend,
        "target": target,
        "models": [model.name for model in plan.models],
        "front": layout.FRONT,
        "root": plan.root,
        "decoupled": True,
        "max_batch_size": plan.max_batch_size,
        "bls_max_concurrency": plan.options.bls_max_concurrency,
        "tokenizer_vocab_size": tokenizer_vocab_size,
        "world_size": engine.world_size,
        "engine_version": engine.version,
        "limits": {
            "max_batch_size": engine.max_batch_size,
            "max_input_len": engine.max_input_len,
            "max_seq_len": engine.max_seq_len,
            "max_num_tokens": engine.max_num_tokens,
        },
        "image": None if engine.is_cpu else plan.options.image,
    }


def _write_model(folder: Path, model: ModelConfig) -> None:
    text = _text(f"{model.name}.pbtxt.j2", model=model)
    config_text.parse(text, f"{model.name}/config.pbtxt")  # before anything of it is written
    _write(folder / model.name / "config.pbtxt", text)
    version = folder / model.name / "1"
    version.mkdir()
    if model.backend == "python":
        for source in python_sources(model.name):
            shutil.copyfile(source, version / source.name)


def python_sources(model: str) -> list[Path]:
    """The Python files of a model's version folder: its own, and those that all models share."""
    return sorted([*(PYTHON_MODELS / model).glob("*.py"), *(PYTHON_MODELS / "shared").glob("*.py")])


def _text(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, autoescape=False,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["quoted"] = config_text.quote
    return environment.get_template(template).render(**values)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _place(source: Path, target: Path, *, copy: bool) -> None:
    """Hard-link ``source`` at ``target``, or copy it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
                raise
    shutil.copyfile(source, target)
