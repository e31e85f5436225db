"""The YAML documents that a user writes or names: shipped ones and files, read the same way whatever they are about.

Only the safe part of YAML is read, and no key may stand twice.
"""

from __future__ import annotations

from importlib import resources
from importlib.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from minitron.errors import InputError, UsageError


def shipped(folder: str) -> list[str]:
    """Names of the documents that come with the toolkit in a folder of a package, such as "minitron/recipes"."""
    items = _place(folder).iterdir()
    return sorted(item.name.removesuffix(".yaml") for item in items if item.name.endswith(".yaml"))


def read(name: str, folder: str, what: str) -> tuple[str, dict[str, Any]]:
    """Where a document is and the mapping that it holds: a shipped one of ``folder`` by its name, or a file.

    ``what`` it is goes into errors. Raises UsageError where there is none, InputError where it cannot be read.
    """
    if name in shipped(folder):
        where = f"{what} {name}"
        return where, mapping((_place(folder) / f"{name}.yaml").read_text("utf-8"), where)
    try:
        return name, mapping(Path(name).read_text(encoding="utf-8"), name)
    except FileNotFoundError:
        raise UsageError(
            f"there is no {what} {name}: it is neither a file nor one of those shipped ({', '.join(shipped(folder))})"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {name} cannot be read: {error}") from error


def _place(folder: str) -> Traversable:
    package, _, below = folder.partition("/")
    return resources.files(package).joinpath(*below.split("/"))


def put(document: dict[str, Any], path: str, value: Any) -> None:
    """Put a value at a dotted path. Where a step of it is no section, nothing is put: the validation will say so."""
    *sections, last = path.split(".")
    for step in sections:
        below = document.setdefault(step, {})
        if not isinstance(below, dict):
            return
        document = below
    document[last] = value


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader keeps the last of two equal keys, which nobody means."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(text: str, where: str) -> Any:
    """The value that a text stands for; raises InputError."""
    try:
        return yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid YAML: {error}") from error


def mapping(text: str, where: str) -> dict[str, Any]:
    """The mapping that a document holds, an empty one for an empty document; raises InputError."""
    document = parse(text, where)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise InputError(f"{where} holds no mapping of keys to values")
    return document
