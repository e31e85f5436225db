"""trtllm-build and the image it is in, held against trtllm_build.yaml and compat.yaml."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron.acceptance import Line, judge
from minitron.machine.compat import Image, same_version, version_key
from minitron_build.engines.tensorrt.flags import Flag, Value, flags
from minitron_build.probe.asking import Place, answers

_OPTION = re.compile(r"^  (?P<names>-\S.*?)(?:  +(?P<about>\S.*))?$")
_NAME = re.compile(r"--([a-z][a-z0-9_]*)")
_DEFAULT = re.compile(r"\(default: (.*)\)$", re.DOTALL)
_NOT_ASKED = ("help",)


@dataclass(frozen=True)
class HelpEntry:
    """A flag as the help shows it: all its names, and the text of its default (None: the help shows none)."""

    names: tuple[str, ...]
    default: str | None


def judge_tool(place: Place, image: Image, argv: Sequence[str]) -> list[Line]:
    """The lines of step ``tool``; ``argv``: trtllm-build with the very flags that are to build. Raises
    MissingDependency, ToolError.
    """
    with (
        tempfile.TemporaryDirectory(prefix="minitron-probe-") as scratch,
        answers(place, "tool", {"flags": _flags(Path(scratch), argv)}) as folder,
    ):
        command = json.loads((folder / "command.json").read_text(encoding="utf-8"))
        entries = read_help((folder / "help.txt").read_text(encoding="utf-8"))
        versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    known = flags()
    refused = [f"it ends with {command['code']}: {command['said']}"] if command["code"] else []
    return [
        judge("tool.command", refused, f"{sum(word.startswith('--') for word in argv)} flags taken"),
        judge("tool.flags", _flag_problems(entries, known), f"{len(entries)} flags, all as in the data file"),
        judge("tool.defaults", _default_problems(entries, known), _compared(entries, known)),
        judge("tool.versions", _version_problems(versions, image), f"{image.tag}: " + ", ".join(
            f"{name} {version}" for name, version in versions.items())),
    ]  # fmt: skip


def _flags(folder: Path, argv: Sequence[str]) -> Path:
    folder.chmod(0o755)
    (folder / "flags.json").write_text(json.dumps(list(argv)), encoding="utf-8")
    return folder


def read_help(text: str) -> dict[str, HelpEntry]:
    """The flags in an argparse help, by their first name.

    trtllm-build uses ArgumentDefaultsHelpFormatter: where there is a help text and a default, it ends in ``(default:
    X)``. The text must be wide enough that no line was broken, or its continuation lines are joined here.
    """
    found: dict[str, HelpEntry] = {}
    for names, about in _options(text):
        first, *others = (name for name in names if name not in _NOT_ASKED) if names else [""]
        if first:
            default = _DEFAULT.search(about)
            found[first] = HelpEntry((first, *others), default[1] if default else None)
    return found


def _options(text: str) -> list[tuple[list[str], str]]:
    """Names and joined help text of every option."""
    found: list[tuple[list[str], str]] = []
    for line in text.splitlines():
        option = _OPTION.match(line)
        if option and option["names"].startswith("-"):
            found.append((list(dict.fromkeys(_NAME.findall(option["names"]))), option["about"] or ""))
        elif found and line.startswith("      ") and line.strip():
            names, about = found[-1]
            found[-1] = names, f"{about} {line.strip()}".strip()
        elif found and line and not line.startswith(" "):
            found.append(([], ""))  # a heading ends the option before it
    return [(names, about) for names, about in found if names and names != ["help"]]


def _flag_problems(entries: dict[str, HelpEntry], known: dict[str, Flag]) -> list[str]:
    missing = [f"--{name} is not there" for name in known if name not in entries]
    surplus = [f"--{name} is there and not in the data file" for name in entries if name not in known]
    aliases = [
        f"--{flag.alias} is no longer another name of --{name}"
        for name, flag in known.items()
        if flag.alias and name in entries and flag.alias not in entries[name].names
    ]
    return missing + surplus + aliases


def _default_problems(entries: dict[str, HelpEntry], known: dict[str, Flag]) -> list[str]:
    return [
        f"--{name} has default {entry.default}, and {_shown(known[name].default)} was expected"
        for name, entry in entries.items()
        if name in known and entry.default is not None and entry.default != _shown(known[name].default)
    ]


def _compared(entries: dict[str, HelpEntry], known: dict[str, Flag]) -> str:
    silent = [f"--{name}" for name, entry in entries.items() if name in known and entry.default is None]
    without = f"; the help shows none for {', '.join(silent)}" if silent else ""
    return f"{len(entries) - len(silent)} defaults compared{without}"


def _shown(value: Value | None) -> str:
    """As Python's str shows the default of argparse."""
    return str(value)


def _version_problems(versions: Mapping[str, str | None], image: Image) -> list[str]:
    """TensorRT-LLM must be the same release and TensorRT equal; of CUDA and Triton, major and minor version."""
    llm, tensorrt = versions.get("tensorrt_llm") or "", versions.get("tensorrt") or ""
    problems = []
    if not same_version(llm, image.tensorrt_llm):
        problems.append(f"tensorrt_llm is {llm}, and compat.yaml says {image.tensorrt_llm}")
    if version_key(tensorrt) != version_key(image.tensorrt):
        problems.append(f"tensorrt is {tensorrt}, and compat.yaml says {image.tensorrt}")
    for name, wanted in (("cuda", image.cuda), ("server", image.server)):
        found = versions.get(name)
        if found and wanted and version_key(found)[:2] != version_key(wanted)[:2]:
            problems.append(f"{name} is {found}, and compat.yaml says {wanted}")
    return problems
