"""Write a model repository: configs from templates, our Python models, the tokenizer and the engine, in one folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from minitron import files
from minitron.artifacts import manifest
from minitron.errors import EngineError, InputError
from minitron.machine import compat
from minitron.model import tokenizer_files
from minitron_triton.repository import engine_folder, layout, writing
from minitron_triton.repository.layout import Repository
from minitron_triton.repository.options import RepositoryOptions
from minitron_triton.server import container
from minitron_triton.server.launch import Served

log = logging.getLogger(__name__)


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
    if options.max_logits_bytes and not (facts.gather_generation_logits or facts.gather_context_logits):
        log.warning(
            "%s was not built to gather logits, so none are offered; build it with serving.max_logits_bytes", engine
        )
    tokenizer = engine / "tokenizer"
    names = tokenizer_files.present(tokenizer)
    size = tokenizer_files.vocabulary_size(tokenizer)
    if size is not None and size > facts.vocab_size:
        raise EngineError(
            f"{tokenizer} has ids up to {size - 1}, and the engine knows {facts.vocab_size}: it is the tokenizer of "
            "another model; convert and build with the right one"
        )
    tokenizer_files.check_end_ids(tokenizer, facts.vocab_size)
    tokenizer_files.check_chat_template(tokenizer)
    plan = layout.plan(
        facts, options,
        root=writing.root_as_seen(root, str(output) if facts.is_cpu else writing.CONTAINER_ROOT),
        add_special_tokens=tokenizer_files.wants_special_tokens(tokenizer),
    )  # fmt: skip
    engine_files = [name for name in files.tree_files(engine) if not name.startswith("tokenizer/")]
    needed = sum((engine / name).stat().st_size for name in engine_files) if copy else 0
    with files.new_folder(output, force=force, needed_bytes=needed) as folder:
        for model in plan.models:
            writing.write_model(folder, model, model.name)
        for name in names:
            writing.place(tokenizer / name, folder / "tokenizer" / name, copy=True)
        for name in engine_files:
            writing.place(engine / name, folder / "engine" / name, copy=copy)
        if not facts.is_cpu:
            text = writing.render_text(
                writing.COMPOSE, root=plan.root, ranks=facts.world_size, options=options,
                **container.composed(_served(plan, output)),
            )  # fmt: skip
            writing.write(folder / "docker-compose.yaml", text)
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
        folder, plan.backend, tuple(model.name for model in plan.models), layout.TEXT_MODEL, Path(plan.root),
        plan.engine.world_size, plan.options.image, plan.options.shm_bytes,
    )  # fmt: skip


def _input(engine: Path) -> tuple[manifest.Input, manifest.Manifest]:
    try:
        return manifest.input_of(engine, "engine")
    except InputError as error:
        raise EngineError(f"{error}; 'minitron build' makes an engine") from error


def _changed(options: RepositoryOptions) -> dict[str, Any]:
    plain = RepositoryOptions()
    return {name: value for name, value in vars(options).items() if value != getattr(plain, name)}


def _details(plan: Repository, target: str, tokenizer_vocab_size: int | None) -> dict[str, Any]:
    engine = plan.engine
    return {
        "backend": plan.backend,
        "target": target,
        "models": [model.name for model in plan.models],
        "front": layout.TEXT_MODEL,
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
        "shm_bytes": plan.options.shm_bytes,
    }
