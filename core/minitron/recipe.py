"""The recipe: one strict YAML file that says what is wanted, and that every stage takes its values from.

A value is looked up in four layers, the later ones winning: the default of the field, the recipe file, the environment
(``MINITRON_RECIPE_`` and the field's path in capitals: ``MINITRON_RECIPE_WORKLOAD_CONCURRENCY``), a flag. Whatever its
layer, an unknown key or a value of the wrong type is an error that names its place, and ``Effective.origins`` tells
which layer each value came from.

A command takes part with two lines; the flags' names, choices and help come from the fields below::

    recipe.add_flags(parser, "precision", "tensor_parallel")      # in configure(): --recipe, --precision, --tp
    wanted = recipe.from_args(args).recipe                        # in run(): the Recipe, all layers applied

A flag that a command declares itself takes part as well when its ``dest`` is the field's (``dest_of``) and its default
None. Without ``--recipe`` (or ``MINITRON_RECIPE``) the defaults below hold, so they stand here only.

The fields are in ``recipe_model``. Only commands that take a recipe import this (and with it pydantic and PyYAML).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from minitron import documents
from minitron.arguments import complete_with
from minitron.errors import InputError, UsageError
from minitron.recipe_model import Recipe

ENVIRONMENT = "MINITRON_RECIPE"
_FOLDER = "minitron/recipes"


@dataclass(frozen=True)
class Effective:
    """A recipe with all layers applied; ``origins`` maps each field's path to the layer it came from."""

    recipe: Recipe
    name: str
    origins: dict[str, str]

    def rows(self) -> list[tuple[str, Any, str]]:
        """(path, value, origin) of every field, in the order of the models."""
        document = self.recipe.model_dump()
        return [(path, _get(document, path), self.origins[path]) for path, _ in fields()]


def fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted path and description of every field that holds a value."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def _extra(info: FieldInfo, key: str) -> str | None:
    extra = info.json_schema_extra
    return str(extra[key]) if isinstance(extra, dict) and extra.get(key) else None


def flag_of(path: str) -> str:
    """The flag of a field: ``workload.concurrency`` is ``--concurrency``."""
    return _extra(_BY_PATH[path], "flag") or "--" + path.rpartition(".")[2].replace("_", "-")


def dest_of(path: str) -> str:
    """The attribute of parsed arguments in which a field's flag ends up."""
    return _extra(_BY_PATH[path], "dest") or path.rpartition(".")[2]


def environment_name(path: str) -> str:
    """The environment variable of a field."""
    return f"{ENVIRONMENT}_{path.replace('.', '_').upper()}"


def is_variable(name: str) -> bool:
    """Whether an environment variable is a layer of the recipe, or names one."""
    return name == ENVIRONMENT or name.startswith(ENVIRONMENT + "_")


_BY_PATH = dict(fields())


def add_flags(parser: argparse.ArgumentParser, *paths: str) -> None:
    """Declare ``--recipe`` and a flag for each field named; all default to None, which means: not given."""
    if not any(action.dest == "recipe" for action in parser._actions):
        about = f"recipe to take values from: {', '.join(shipped())}, or a YAML file"
        complete_with(parser.add_argument("--recipe", metavar="NAME|FILE", help=about), shipped())
    for path in paths:
        info = _BY_PATH[path]
        about = f"{info.description} (recipe: {path})".replace("%", "%%")
        if info.annotation is bool:
            parser.add_argument(flag_of(path), dest=dest_of(path), action="store_const", const="true", help=about)
        else:
            choices = [str(choice) for choice in get_args(info.annotation) if isinstance(choice, (str, int))]
            parser.add_argument(flag_of(path), dest=dest_of(path), choices=choices or None, help=about,
                                metavar=None if choices else dest_of(path).upper())  # fmt: skip


def from_args(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Effective:
    """The recipe of a command: ``--recipe``, then the environment, then the flags that were given.

    A command that is part of another one may have it given, as ``args.effective``. Raises UsageError or InputError,
    naming the place.
    """
    if (effective := getattr(args, "effective", None)) is not None:
        return effective  # type: ignore[no-any-return]
    given = {path: getattr(args, dest_of(path), None) for path in _BY_PATH}
    flags = {path: value for path, value in given.items() if value is not None}
    return load(getattr(args, "recipe", None) or environment.get(ENVIRONMENT), environment, flags)


def load(
    name: str | None, environment: Mapping[str, str] = os.environ, flags: Mapping[str, Any] | None = None
) -> Effective:
    """Apply the layers: recipe ``name`` (shipped, or a file; None for none), ``environment``, ``flags`` (path → value).

    Strings of the environment and of flags are read as YAML scalars. Raises UsageError, InputError.
    """
    document: dict[str, Any] = {}
    where = "defaults"
    if name is not None:
        where, document = documents.read(name, _FOLDER, "recipe")
    origins = {path: f"recipe {name}" if _has(document, path) else "default" for path in _BY_PATH}
    for path, variable, value in _from_environment(environment):
        documents.put(document, path, _scalar(value, variable))
        origins[path] = f"environment {variable}"
    for path, value in (flags or {}).items():
        text_like = isinstance(value, (str, Path))
        documents.put(document, path, _scalar(str(value), flag_of(path)) if text_like else value)
        origins[path] = f"flag {flag_of(path)}"
    return Effective(_validate(document, where, origins), name or "defaults", origins)


def shipped() -> list[str]:
    """Names of the recipes that come with the toolkit."""
    return documents.shipped(_FOLDER)


def _scalar(text: str, where: str) -> Any:
    try:
        return documents.parse(text, repr(text))
    except InputError as error:
        raise UsageError(f"{where}: {error}") from error


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    paths = {environment_name(path): path for path in _BY_PATH}
    for variable in sorted(environment):
        if variable in paths:
            yield paths[variable], variable, environment[variable]
        elif variable.startswith(ENVIRONMENT + "_"):
            raise UsageError(f"environment variable {variable} names no field of a recipe{_hint(variable, paths)}")


def _validate(document: dict[str, Any], where: str, origins: Mapping[str, str]) -> Recipe:
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        # A field that may be one of several types reports "int" or a model's name as a last step of the place.
        path = ".".join(str(step) for step in first["loc"] if step not in ("int", "str", "Percentiles"))
        origin = origins.get(path, where)
        place = where if origin.startswith("recipe ") or origin == "default" else origin
        raise (InputError if place == where and where != "defaults" else UsageError)(
            f"{place}: {path + ': ' if path else ''}{_reason(first, path)}"
        ) from None


def _reason(error: Any, path: str) -> str:
    if error["type"] == "extra_forbidden":
        known = {name for name, _ in fields()} | {name.rpartition(".")[0] for name, _ in fields()} - {""}
        return f"there is no such key{_hint(path, known)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error.get("input")
    shown = "" if isinstance(value, (dict, BaseModel)) else f" (it is {value!r})"
    return message[:1].lower() + message[1:] + shown


def _hint(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _has(document: Mapping[str, Any], path: str) -> bool:
    return _get(document, path, missing=_MISSING) is not _MISSING


_MISSING = object()


def _get(document: Any, path: str, missing: Any = None) -> Any:
    for step in path.split("."):
        if not isinstance(document, Mapping) or step not in document:
            return missing
        document = document[step]
    return document
