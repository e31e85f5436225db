"""What is there already, and judged alone: a checkpoint, an engine, a repository whose server runs, stored tokens."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron.artifacts import manifest
from minitron.checks import of_step
from minitron.errors import UsageError
from minitron.recipe import Effective
from minitron.recipe_model import Limits, Recipe
from minitron_cli import running
from minitron_cli.accept import serving
from minitron_client.client.arguments import security
from minitron_client.client.endpoint import Endpoint
from minitron_triton.server.state import State

#: What each kind can be asked, in the order of an acceptance.
PARTS: dict[str, tuple[str, ...]] = {
    "checkpoint": ("checkpoint",),
    "engine": ("engine",),
    "repository": ("engine", "audit", "tokens", "bursts", "speed", "behaviour", "tasks"),
    "tokens": ("words",),
}
#: Length of prompts and answers where neither recipe nor engine asks for another.
_TOKENS = 128
#: Of a repository, what its running server is asked.
_OF_THE_SERVER = PARTS["repository"][1:]


@dataclass(frozen=True)
class AcceptanceSubject:
    """``given``: its folders or file by stage. ``recipe``: of the run, with what the subject itself says.

    ``only``: what is asked of it (see ``walk.chosen``). ``folder``: where the evidence goes unless the user says.
    """

    given: Mapping[str, Path]
    recipe: Recipe
    only: Mapping[str, frozenset[str]]
    folder: Path
    running: serving.FoundServer | None = field(default=None, compare=False)


def find(
    args: argparse.Namespace, effective: Effective, only: Mapping[str, frozenset[str]]
) -> AcceptanceSubject | None:
    """The subject that the arguments name, None where a recipe is to be accepted.

    Raises UsageError, InputError, NotReady (no such server runs).
    """
    path: Path | None = args.subject
    recipe_named = effective.name != "defaults" or args.model is not None
    if path is None and (not only or recipe_named or not set(only) <= set(_OF_THE_SERVER)):
        return None
    found = None
    if path is None:
        found = running.ready(args.state, None)
        path = found.repository
    kind = "tokens" if path.is_file() else manifest.stage_of(path)
    asked = dict(_asked(kind, only, path))
    if args.url and not only:
        asked.pop("audit", None)  # the runtime's log is where it runs
    folder = Path("out", "-".join(["accept", *path.absolute().parts[-2:]]))
    if kind == "tokens":
        if args.reference is None:
            raise UsageError("stored tokens are compared with others; give --reference")
        return AcceptanceSubject({"tokens": path}, effective.recipe, asked, folder)
    if kind == "checkpoint":
        if effective.recipe.target != "cpu" and not recipe_named:
            raise UsageError("codes and scales are compared with those of the source model; give --model")
        return AcceptanceSubject({"checkpoint": path}, effective.recipe, asked, folder)
    engine = path if kind == "engine" else path / "engine"
    wanted = _as_built(effective.recipe, manifest.read(engine, "engine").details)
    if kind == "engine":
        return AcceptanceSubject({"engine": path}, wanted, asked, folder)
    server = _running(args, path, found) if set(asked) & set(_OF_THE_SERVER) else None
    return AcceptanceSubject({"repository": path, "engine": engine}, wanted, asked, folder, server)


def _asked(kind: str, only: Mapping[str, frozenset[str]], path: Path) -> Mapping[str, frozenset[str]]:
    if surplus := [step for step in only if step not in PARTS[kind]]:
        raise UsageError(f"{path} can be asked {', '.join(PARTS[kind])}, and not {', '.join(surplus)}")
    return only or {step: frozenset(entry.name for entry in of_step(step)) for step in PARTS[kind]}


def _as_built(wanted: Recipe, details: Mapping[str, Any]) -> Recipe:
    """The recipe with what the engine was really built for; without a workload of its own, with one that fits."""
    limits = {name: details["limits"].get(name) for name in Limits.model_fields}
    fits: dict[str, int] = {}
    if wanted.workload.input_tokens is None:
        fits = {"input_tokens": min(_TOKENS, limits["max_input_len"] // 2),
                "output_tokens": min(_TOKENS, limits["max_seq_len"] // 2),
                "concurrency": min(wanted.workload.concurrency, limits["max_batch_size"])}  # fmt: skip
    return wanted.model_copy(update={
        "target": details.get("target", "cpu"), "precision": details["precision"],
        "limits": wanted.limits.model_copy(update=limits), "workload": wanted.workload.model_copy(update=fits),
    })  # fmt: skip


def _running(args: argparse.Namespace, repository: Path, found: State | None) -> serving.FoundServer:
    """The server of ``repository`` that --url names, or that 'minitron serve' started here."""
    urls = {"grpc": args.url, "http": args.http_url, "metrics": args.metrics_url}
    if args.url is None:
        found = found or running.ready(args.state, repository)
        urls = found.urls | {name: url for name, url in urls.items() if url}
    url = str(urls["grpc"])
    return serving.FoundServer({name: known for name, known in urls.items() if known}, Endpoint(url, *security(args)),
                           ["--url", url, *_security_flags(args)], found)  # fmt: skip


def _security_flags(args: argparse.Namespace) -> Sequence[str | Path]:
    given = {"--tls-ca": args.tls_ca, "--tls-cert": args.tls_cert, "--tls-key": args.tls_key,
             "--api-key-file": args.api_key_file}  # fmt: skip
    pairs = [(flag, path) for flag, path in given.items() if path is not None]
    return [*(["--tls"] if args.tls else []), *(word for pair in pairs for word in pair)]
