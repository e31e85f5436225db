"""What a shell offers, asked as bash asks it: by argcomplete's protocol (its README, "Global completion": variables
_ARGCOMPLETE, COMP_LINE and COMP_POINT; the answer goes to descriptor 8 or to the file that is named)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("conv", {"convert"}),
        ("convert --prec", {"--precision"}),
        ("convert --precision int8_", {"int8_weight_only"}),
        ("plan --recipe a100-int", {"a100-int4", "a100-int4-awq", "a100-int8"}),
        ("plan --recipe some-fi", {"some-file.yaml"}),
        ("bench --profile st", {"steady-poisson"}),
    ],
)
def test_commands_flags_names_and_files_are_completed(typed: str, offered: set[str], tmp_path: Path) -> None:
    (tmp_path / "some-file.yaml").touch()
    line, answer = f"minitron {typed}", tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
             "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "minitron_cli"], cwd=tmp_path, env=os.environ | asked, check=False)
    assert done.returncode == 0
    assert {word.strip() for word in answer.read_text().split("\n")} == offered
