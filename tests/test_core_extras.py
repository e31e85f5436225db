"""What is said where a module is missing: the extra that has it, as pyproject.toml lists them."""

from __future__ import annotations

import ast
import re

import pytest

from conftest import ROOT
from minitron import extras
from minitron_cli.main import explain


def requirements(section: str) -> set[str]:
    """Those of one list of pyproject.toml (whose tables Python 3.10 cannot read by itself)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf"^{section} = (\[.*?\])$", re.sub(r"\s+#.*", "", text), re.MULTILINE | re.DOTALL)
    assert found, section
    return set(ast.literal_eval(found[1]))


def test_every_extra_s_modules_are_those_of_its_packages() -> None:
    """A module is called as its package is, but for these two."""
    others = {"nvidia-pytriton": "pytriton"}
    for extra, modules in extras.MODULES.items():
        names = {re.split(r"[\[<>=; ]", one)[0] for one in requirements(extra)} - {"minitron-trtllm"}
        theirs = {others.get(name, name).replace("-", "_") for name in names}
        theirs = {name.partition("_")[0] if name.startswith("opentelemetry") else name for name in theirs}
        more = {"transformers"} if extra == "eval" else set()  # which the gateway has, and eval for itself
        assert theirs - more == set(modules), extra


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("starlette.applications", "pip install '.[gateway]' in the checkout"),
        ("openvino_genai", "pip install '.[cpu]' in the checkout"),
        ("gguf", "pip install '.[gguf]' in the checkout"),
        ("yaml", "pip install . in the checkout"),
        ("tensorrt_llm", "pip install '.[tensorrt-llm]' --extra-index-url https://pypi.nvidia.com in the checkout"),
    ],
)
def test_a_missing_module_is_told_with_the_smallest_extra_that_has_it(module: str, command: str) -> None:
    message, code = explain(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert command in message and module in message and code == 5
