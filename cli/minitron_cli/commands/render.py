"""``minitron render``: a Triton model repository from an engine."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from pathlib import Path

from minitron import console, recipe
from minitron.errors import UsageError
from minitron.recipe_model import Recipe
from minitron_triton.repository.options import FROM_RECIPE, RepositoryOptions, from_recipe


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("engine", type=Path, metavar="ENGINE",
        help="folder of 'minitron build'; with --backend llmapi a Hugging Face folder")  # fmt: skip
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--root", metavar="PATH", help="the folder as the server will see it "
        "(default: DIR for a CPU engine, /models for a GPU engine)")  # fmt: skip
    add("--force", action="store_true", help="replace DIR if it is there")
    add("--copy", action="store_true", help="copy the engine's files instead of hard-linking them")
    add("--json", action="store_true", help="print one JSON document")
    recipe.add_flags(parser, "backend", "precision", "dtype", "target", "tensor_parallel", "pipeline_parallel",
                     *FROM_RECIPE, "container.image_tag")  # fmt: skip
    _add_options(parser.add_argument_group("serving options that no recipe knows"))


def _own_fields() -> list[dataclasses.Field[object]]:
    """The options that no recipe knows."""
    known = {*FROM_RECIPE.values(), "image", "parameters"}
    return [field for field in dataclasses.fields(RepositoryOptions) if field.name not in known]


def _add_options(group: argparse._ArgumentGroup) -> None:
    """One flag for each of them; what is not given keeps the field's default."""
    types = typing.get_type_hints(RepositoryOptions)
    group.add_argument("--parameter", action="append", default=[], metavar="KEY=VALUE",
                       help="further parameter of the TensorRT-LLM backend; may be given again")  # fmt: skip
    for field in _own_fields():
        kinds = [kind for kind in typing.get_args(types[field.name]) or (types[field.name],) if kind is not type(None)]
        flag, about = "--" + field.name.replace("_", "-"), field.metadata["about"]
        about += "" if field.default is None else f" (default: {field.default})"
        if kinds[0] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=about)
        else:
            group.add_argument(flag, type=kinds[0], default=None, metavar="VALUE", help=about)


def _options(args: argparse.Namespace, wanted: Recipe) -> RepositoryOptions:
    given = {field.name: getattr(args, field.name) for field in _own_fields()}
    pairs = [pair.partition("=") for pair in args.parameter]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise UsageError(f"--parameter {wrong[0]} has no value; write KEY=VALUE")
    return from_recipe(
        wanted,
        parameters={key: value for key, _, value in pairs},
        **{name: value for name, value in given.items() if value is not None},
    )


def run(args: argparse.Namespace) -> int:
    """Render, and say which models there are."""
    wanted = recipe.from_args(args).recipe
    options = _options(args, wanted)
    if wanted.backend == "llmapi":
        return _render_llmapi(args, wanted, options)
    from minitron_triton.repository.render import render

    repository = render(args.engine, args.output, options, root=args.root, force=args.force, copy=args.copy)
    folder = args.output.absolute()
    if args.json:
        console.emit_json(
            {
                "repository": str(folder),
                "root": repository.root,
                "backend": repository.backend,
                "max_batch_size": repository.max_batch_size,
                "models": [model.name for model in repository.models],
            }
        )
    else:
        rows = [
            (model.name, model.backend or "ensemble", model.max_batch_size, model.instances, len(model.inputs))
            for model in repository.models
        ]
        print(console.table(rows, ("model", "backend", "max_batch_size", "instances", "inputs")))
        print(f"repository: {folder} (the server sees it as {repository.root})")
    return 0


def _render_llmapi(args: argparse.Namespace, wanted: Recipe, options: RepositoryOptions) -> int:
    from minitron_triton.repository import llmapi

    model = llmapi.render(
        args.engine, args.output, wanted, options, root=args.root, force=args.force, copy=args.copy
    )  # fmt: skip
    folder = args.output.absolute()
    if args.json:
        console.emit_json({"repository": str(folder), "backend": "llmapi", "models": [model.name]})
    else:
        print(f"repository: {folder} (one model, {model.name}, over the LLM API)")
    return 0
