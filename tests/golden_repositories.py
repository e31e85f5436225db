"""The configs that each shipped recipe renders, for review: 'python tests/golden_repositories.py' writes them anew.

Engines are made by hand with the recipe's kind of target; the server sees every repository at /models.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [
        str(TESTS),
        *(str(TESTS.parent / room) for room in ("core", "build", "model_repo", "clients", "cli", "models")),
    ]

import hand_made  # noqa: E402
from conftest import SMALL_MODEL  # noqa: E402
from minitron import recipe  # noqa: E402
from minitron_triton.repository import llmapi  # noqa: E402
from minitron_triton.repository.options import from_recipe  # noqa: E402
from minitron_triton.repository.render import render  # noqa: E402

GOLDEN = TESTS / "data" / "golden_repositories"
REVIEWED = ("config.pbtxt", "model.yaml", "docker-compose.yaml")


def rendered(name: str, folder: Path) -> Path:
    """The repository that the shipped recipe ``name`` makes of its kind of engine (or model), in ``folder``."""
    wanted = recipe.load(name, {}).recipe
    output = folder / "repository"
    if wanted.backend == "llmapi":
        llmapi.render(
            SMALL_MODEL, output, wanted, from_recipe(wanted), root="/models", force=False, copy=False
        )  # fmt: skip
    else:
        engine = hand_made.engine_folder(folder / "engine", cpu=wanted.target == "cpu", tp=wanted.tensor_parallel,
                                         plugins={"use_paged_context_fmha": True})  # fmt: skip
        render(engine, output, from_recipe(wanted), root="/models")
    return output


def texts(repository: Path) -> dict[str, str]:
    """The reviewed files of a repository by their relative path."""
    found = sorted(path for path in repository.rglob("*") if path.name in REVIEWED)
    return {path.relative_to(repository).as_posix(): path.read_text(encoding="utf-8") for path in found}


def main() -> None:
    """Write the golden trees anew."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name in recipe.shipped():
        with tempfile.TemporaryDirectory() as folder:
            for path, text in texts(rendered(name, Path(folder))).items():
                (GOLDEN / name / path).parent.mkdir(parents=True, exist_ok=True)
                (GOLDEN / name / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
