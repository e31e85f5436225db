"""When two engines' tokens agree: equal, or different at a near tie. Numbers are made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from conftest import minitron
from minitron.errors import InputError
from minitron_client.parity.compare import TOLERANCES, compare
from minitron_client.parity.stored import PROMPTS, Continuation, Words

LN_HALF = math.log(0.5)


def words(tokens: list[int], log_probs: list[float], checkpoint: str = "c", dtype: str = "float16") -> Words:
    one = Continuation("p", (1, 2), tuple(tokens), tuple(log_probs))
    return Words(checkpoint, "engine", dtype, (one,))


REFERENCE = words([5, 6, 7, 8], [-0.1, -0.2, LN_HALF - 0.02, -0.3])


@pytest.mark.parametrize(
    ("tokens", "log_probs", "place", "problem"),
    [
        ([5, 6, 7, 8], [-0.1, -0.25, -0.7, -0.3], None, None),
        ([5, 6, 7, 8], [-0.1, -0.35, -0.7, -0.3], None, "token 1 has log prob -0.350, and -0.200"),
        # two tokens of about one half each: either may be taken, and then the texts are different ones
        ([5, 6, 9, 1], [-0.1, -0.2, LN_HALF - 0.05, -9.0], 2, None),
        ([5, 6, 9, 8], [-0.1, -0.2, LN_HALF - 0.15, -0.3], 2, "no near tie"),
        # equally sure of different tokens: no two of them can have probability 0.9
        ([4, 6, 7, 8], [-0.1, -0.2, -0.7, -0.3], 0, "no near tie"),
        ([5, 6, 7, 9], [-0.1, -0.2, -0.7, -0.3], 3, "token 3 is 9 (log prob -0.300), and 8 (-0.300)"),
    ],
)
def test_a_difference_is_explained_by_a_near_tie_or_not_at_all(
    tokens: list[int], log_probs: list[float], place: int | None, problem: str | None
) -> None:
    (found,) = compare(words(tokens, log_probs), REFERENCE, 0.1)
    assert found.first_difference == place
    assert (found.problem is None) if problem is None else problem in str(found.problem)
    assert found.equal_tokens == (4 if place is None else place)


def test_only_the_same_checkpoint_and_prompts_are_compared() -> None:
    with pytest.raises(InputError, match="the reference is of checkpoint c, and this engine of d"):
        compare(words([5], [-0.1], "d"), words([5], [-0.1]), 0.1)
    with pytest.raises(InputError, match="other prompts"):
        compare(words([5], [-0.1]), REFERENCE, 0.1)


def test_files_are_read_back_as_written_and_the_command_gives_the_verdict(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    REFERENCE.write(one)
    assert Words.read(one) == REFERENCE
    words([4, 6, 7, 8], [-0.1] * 4).write(other)
    done = minitron("tokens", "compare", other, one, "--json", check=False)
    (line,) = json.loads(done.stdout)["lines"]
    assert (done.returncode, line["id"], line["status"]) == (8, "words.same", "FAIL")
    assert minitron("tokens", "compare", one, one).returncode == 0
    assert minitron("tokens", "compare", other, one, "--tolerance", "9").returncode == 0
    other.write_text("{}")
    done = minitron("tokens", "compare", other, one, check=False)
    assert done.returncode == 3 and "cannot be read as tokens" in done.stderr


def test_there_are_twenty_different_prompts_and_a_tolerance_for_every_type() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) == 20
    assert set(TOLERANCES) >= {"float16", "bfloat16"}
