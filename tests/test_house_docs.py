"""What is written is true: the command line's page, the links, and the house's own rules about text."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOMS, ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_cli_page_is_what_the_commands_say() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "write_docs.py", "--check"], check=False)
    assert done.returncode == 0, "docs/cli.md is old: run 'make docs'"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_modules_stay_small() -> None:
    """One subject a module: past 400 lines two of them share a file."""
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"


def test_every_make_target_is_phony_and_explained() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE))
    phony = {name for line in phony for name in line.split()}
    targets = set(re.findall(r"^([a-z0-9-]+):", text, re.MULTILINE))
    assert targets <= phony
    explained = set(re.findall(r"^([a-z0-9-]+):.*## ", text, re.MULTILINE))
    assert targets <= explained


def test_the_walks_are_short_and_lead_through_files_that_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walks = text.partition("## Two walks")[2].partition("\n## ")[0].split("\n**A ")[1:]
    assert len(walks) == 2
    for walk in walks:
        steps = re.findall(r"^\d\. `([^`]+)`", walk, re.MULTILINE)
        assert 3 < len(steps) <= 7
        assert all((ROOT / step).is_file() for step in steps), steps
    named = re.findall(r"`((?:core|build|model_repo|clients|cli|tests|tools|deploy)/[\w./]+\.\w+)`", text)
    assert all((ROOT / name).is_file() for name in named), named
