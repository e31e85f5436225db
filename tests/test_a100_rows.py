"""What a real A100 will say first: each row's fault and its right behaviour, played by doubles; the verdicts differ.

Sources stand with each double: what of them is public text of TensorRT-LLM (file and commit), and what was reported by
users. Nothing here ran on a GPU; docs/a100.md says what was only read.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import pwd
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from minitron import recipe
from minitron.acceptance import FAIL, PASS, SKIPPED, Line, catalogue, judge
from minitron.artifacts import manifest
from minitron.errors import MinitronError, UsageError
from minitron.machine import compat, gpus_here
from minitron.machine.gpus_here import GpuHere
from minitron.model.activations import Activations
from minitron.text.errors import RequestError
from minitron.text.prompts import PromptMaker
from minitron.text.request import TextRequest
from minitron_build.engines.tensorrt import flags
from minitron_build.plan.engine_plan import plan
from minitron_build.plan.model import look_up
from minitron_cli.accept import speed
from minitron_cli.accept.work import finite
from minitron_client.conformance.subject import TENSORRT, Answer, Limits, Subject
from minitron_client.conformance.suite import run
from minitron_triton.audit.judging import judge_all
from minitron_triton.audit.runtime_log import RuntimeLog
from minitron_triton.server import container
from minitron_triton.server.launch import Options, Ports, Served
from test_model_repo_audit import running

BUILT = Limits(max_batch_size=32, max_input_len=1024, max_seq_len=2048, vocab_size=256_000, max_num_tokens=8192)


class Backend(Subject):
    """TensorRT-LLM's C++ backend as far as a row needs it: it takes prompts up to ``longest``, and ``log_prob`` each.

    Refusals in the words of llmRequest.cpp (119c6e60).
    """

    def __init__(self, *, longest: int = 2047, chunked: bool = True, log_prob: float = -0.5) -> None:
        self.engine, self.limits = TENSORRT, BUILT
        self.prompt, self.greedy = [7, 8, 9], list(range(100, 124))
        self.takes_up_to, self.chunked, self.log_prob = longest, chunked, log_prob

    def _parameters(self, model: str) -> dict[str, str]:
        return {"enable_chunked_context": "true" if self.chunked else "false"}

    def ask(self, tensors: Any, **how: Any) -> Answer:
        length, wanted = tensors["input_ids"].size, tensors["request_output_len"]
        if length > self.takes_up_to:
            text = f"Prompt length ({length}) exceeds maximum input length ({self.takes_up_to})."
            return Answer([], f"Executor failed process requestId 1 due to the following error: {text}", [True])
        outputs = {"output_ids": np.array([[self.greedy[:wanted]]], np.int32)}
        if tensors.get("return_log_probs"):
            outputs["output_log_probs"] = np.full((1, 1, wanted), self.log_prob, np.float32)
            outputs["cum_log_probs"] = np.array([[self.log_prob * wanted]], np.float32)
        return Answer([outputs], None, [True])


def behaviour(case: str, **manners: Any) -> Line:
    (line,) = run(Backend(**manners), [f"behaviour.{case}"])
    return line


#: What begins a line of the C++ logger (logger.h 4f91d4ab, 00f83d1b), and one that no source knows.
BEGINNINGS = {
    "old": ("[TensorRT-LLM][INFO] ", "[TensorRT-LLM][WARNING] "),
    "old, of a rank": ("[TensorRT-LLM][INFO][0] ", "[TensorRT-LLM][WARNING][0] "),
    "new": ("2026-01-31 09:37:44 [TRT-LLM] [I] ", "2026-01-31 09:37:44 [TRT-LLM] [W] "),
    "new, of a rank": ("2026-01-31 09:37:44 [TRT-LLM] [I] [0] ", "2026-01-31 09:37:44 [TRT-LLM] [W] [0] "),
    "Python": ("[01/31/2026-09:37:44] [TRT-LLM] [RANK 0] [I] ", "[01/31/2026-09:37:44] [TRT-LLM] [RANK 0] [W] "),
}
LIMITS = ("TRTGptModel maxBatchSize: 32", "TRTGptModel maxSequenceLen: 2048", "TRTGptModel maxNumTokens: 8192")
LONGEST = "TRTGptModel maxInputLen: {}  = maxSequenceLen - 1 since chunked context is enabled"
NOT_READ = "batch_scheduler_policy parameter was not found or is invalid (must be max_utilization or ...)"


def audited(form: str, *, longest: int = 2047, not_read: bool = False, silent: bool = False) -> Line:
    """What ``audit`` says of a server of recipe a100-int8 whose runtime logs in that form."""
    info, warning = BEGINNINGS[form]
    lines = [] if silent else [*(info + text for text in LIMITS), info + LONGEST.format(longest)]
    return judge_all(running(RuntimeLog.parse(lines + [warning + NOT_READ] * not_read)))[0]


def planned(**changes: Any) -> Line:
    """The plan of recipe a100-bfloat16 with changes: PASS where it says no more than is known, FAIL with its notes."""
    measured = changes.pop("measured", None)
    wanted = recipe.load("a100-bfloat16", {}, changes).recipe
    notes = plan(wanted, replace(look_up(wanted.model), activations=measured)).notes
    return judge("convert.done", notes, "no note")  # any line: a plan has none of its own


class Letters:
    """A tokenizer of one id a letter, for the text model's own checks."""

    end_ids, pad_id = (1,), 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    encode_word = encode


def logits_asked(most: int, tokens: int = 1024) -> Line:
    """A text request of 1,024 tokens with their logits, to a text model that lets one ask for ``most`` bytes."""
    parameters = {"max_input_len": "1024", "max_seq_len": "2048", "vocab_size": "256000", "max_logits_bytes": str(most)}
    prompts = PromptMaker(Letters(), parameters)  # type: ignore[arg-type]
    arrays = {"text_input": np.array([["abc"]], object), "return_generation_logits": np.array([[True]])}
    request = TextRequest.read(arrays, excludes_input=True)
    prompt = prompts.make(arrays["text_input"], np.array([[tokens]], np.int32))
    try:
        prompts.check_logits(request.tokens_with_logits(prompt))
    except RequestError as error:
        return Line("behaviour.refusal", FAIL, str(error))
    return Line("behaviour.refusal", PASS, "taken")


def engine_of(version: str) -> Line:
    """An engine of that version, to be served in the image of 25.11, which says "1.0.3.2510" (compat.yaml)."""
    try:
        compat.check_engine({"tensorrt_llm": version}, "engine", compat.image("25.11-trtllm-python-py3"))
    except UsageError as error:
        return Line("serve.ready", FAIL, str(error))
    return Line("serve.ready", PASS, "served")


def torch_in_the_container(dropped: str = "") -> Line:
    """What ``import torch`` asks for under a user id that passwd lacks, with the environment of 'minitron serve'."""
    served = Served(Path("/r"), "llmapi", ("tensorrt_llm",), "tensorrt_llm", Path("/models"), 1, None, 2 << 30)
    argv = container.launch(served, Options(server_key=""), Ports(), Path("/run"), "mark").argv
    given = dict(word.removeprefix("--env=").split("=", 1) for word in argv if re.match(r"--env=\w+=", word))
    with (
        mock.patch.dict(os.environ, {k: v for k, v in given.items() if k != dropped}, clear=True),
        mock.patch.object(pwd, "getpwuid", side_effect=KeyError("getpwuid(): uid not found: 64321")),
    ):
        try:
            return Line("serve.ready", PASS, getpass.getuser())
        except (KeyError, OSError) as error:
            return Line("serve.ready", FAIL, str(error))


def beside_sixteen_bits(ttft_ms: float) -> Line:
    """An int8 engine whose first token after 1,024 tokens comes that late; with 16 bits it takes 100 ms."""

    def run(ttft: float) -> dict[str, Any]:
        sizes = [(512, 256, 1), (1024, 2, 1)]
        names = ("input_tokens", "output_tokens", "concurrency")
        return {"points": [{"point": dict(zip(names, one, strict=True)), "tokens_per_s": {"value": 300.0},
                            "metrics": {"ttft_ms": {"p50": {"value": ttft}}}} for one in sizes]}  # fmt: skip

    return speed.judge_beside(run(ttft_ms), run(100.0), on_gpu=True)


def stored(log_prob: float) -> Line:
    """Greedy tokens as 'minitron tokens store' leaves them, all with that log prob."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.json"
        path.write_text(json.dumps({"continuations": [{"prompt": "In the", "log_probs": [log_prob] * 3}]}))
        return finite("words.finite", path, "1 prompt")


def remedy(name: str) -> str:
    return catalogue()[name].remedy


def served_on(capability: str = "8.0", mib: int = 81_920, **more: Any) -> Line:
    """'minitron serve' of an engine for sm80 that needs 8.7 GB, on a machine with such a GPU."""
    memory = {"weight_bytes": 5_800_000_000, "activation_bytes": 1_900_000_000, "runtime_bytes": 1 << 30}
    details = {"architecture": "sm80", "plan": {"memory": memory}}
    served = Served(Path("/r"), "tensorrtllm", ("tensorrt_llm",), "tensorrt_llm_bls", Path("/models"), 1, None, 2 << 30)
    here = [GpuHere("a GPU", mib << 20, capability, "590.44.01", **more)]
    with (
        mock.patch.object(gpus_here, "gpus", return_value=here),
        mock.patch.object(manifest, "read", return_value=mock.Mock(details=details)),
    ):
        try:
            container._check_gpus(served)
        except MinitronError as error:
            return Line("serve.ready", FAIL, str(error))
    return Line("serve.ready", PASS, "started")


def reaching(fc: float) -> Activations:
    """A measurement of two layers, the second of which reaches ``fc``."""
    return Activations((12.0, fc), (30.0, 40.0), (50.0, 60.0))


@dataclass(frozen=True)
class Row:
    """``number``: the issue's row, 11 for a GPU that is not an A100. ``seen`` and ``right`` make the line that a
    double's manners lead to; ``says``: what must stand in the first.
    """

    number: int
    what: str
    seen: Callable[[], Line]
    right: Callable[[], Line]
    says: str
    verdicts: tuple[str, str] = (FAIL, PASS)


ROWS = [
    Row(1, "a runtime that takes the build's max_input_len for its limit",
        lambda: behaviour("prompt_limit", longest=1024), lambda: behaviour("prompt_limit"), "trtGptModel.h"),
    Row(1, "a prompt of max_num_tokens without chunked context",
        lambda: behaviour("prompt_limit", longest=9000, chunked=False),
        lambda: behaviour("prompt_limit", chunked=False), "it was answered, and should be refused"),
    Row(1, "a runtime whose log names another prompt limit",
        lambda: audited("old", longest=1024), lambda: audited("old"), "1024 tokens in the runtime, and 2047"),
    Row(2, "float16 and a layer that passes 255.9",
        lambda: planned(precision="float16", measured=reaching(256.0)),
        lambda: planned(precision="float16", measured=reaching(255.8)), "layer 1: mlp.fc reaches 256.0"),
    Row(2, "float16 that nobody measured", lambda: planned(precision="float16"), planned, "were not measured"),
    Row(2, "bfloat16, whatever it reaches",
        lambda: planned(precision="float16", measured=reaching(1e5)), lambda: planned(measured=reaching(1e5)),
        "take bfloat16"),
    Row(3, "logits of 1,024 tokens where no recipe asks", lambda: logits_asked(0), lambda: logits_asked(1_048_576_000),
        "the logits of 1024 tokens take 1,048,576,000 bytes"),  # the issue's figure: 1,024 x 256,000 x 4
    Row(3, "a token more than a request's limit", lambda: logits_asked(1_048_576_000, 1025),
        lambda: logits_asked(1_048_576_000, 1024), "1,049,600,000 bytes"),
    Row(4, "a slice of MIG that the engine does not fit", lambda: served_on(mib=4864, mig=True, profile="1g.5gb"),
        lambda: served_on(mib=40_192, mig=True, profile="3g.40gb"), "MIG 1g.5gb"),
    Row(4, "MIG without an instance", lambda: served_on(mib=0, mig=True), served_on, "turn MIG off"),
    Row(11, "a GPU that is not the engine's", lambda: served_on("9.0"), served_on, "was built for sm80"),
    Row(5, "an engine of another release", lambda: engine_of("1.0.2"), lambda: engine_of("1.0.3"), "1.0.2"),
    Row(5, "an engine of a candidate", lambda: engine_of("1.0.3rc1"), lambda: engine_of("1.0.3+cuda13"), "1.0.3rc1"),
    *(
        Row(6, f"a parameter that was not read, logged in the form {form!r}",
            partial(audited, form, not_read=True), partial(audited, form), NOT_READ)
        for form in BEGINNINGS
    ),
    Row(6, "a log in which not one line of the backend is known",
        lambda: audited("old", silent=True), lambda: audited("old"), "not one line", (SKIPPED, PASS)),
    Row(7, "a container that gives an unknown user no name", lambda: torch_in_the_container("USER"),
        torch_in_the_container, "uid not found"),
    Row(8, "weight-only prefill far behind 16 bits", lambda: beside_sixteen_bits(200.0),
        lambda: beside_sixteen_bits(120.0), "takes 2.00 times as long as with 16 bits"),
    Row(8, "a bound of prefill that counts no unpacking",
        lambda: planned(precision="int8_weight_only", dtype="bfloat16"), planned, "TensorRT-LLM#2553"),
    Row(9, "stored tokens whose log probs are no numbers", lambda: stored(math.nan), lambda: stored(-0.5),
        "log probs that are no numbers"),
    Row(9, "a long prompt that ends in NaN", lambda: behaviour("long_prompt", log_prob=math.nan),
        lambda: behaviour("long_prompt"), "after a prompt of 1000 tokens"),
    Row(9, "more than one GPU", lambda: planned(tensor_parallel=2), planned, "tensorrtllm_backend#577"),
    Row(10, "int4 with one scale a row", lambda: planned(precision="int4_weight_only", dtype="bfloat16"),
        planned, "TensorRT-LLM#2735"),
    Row(9, "log probs that are no numbers",
        lambda: behaviour("log_probs", log_prob=float("nan")), lambda: behaviour("log_probs"), "nan"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.number}: {row.what}")
def test_a_row(row: Row) -> None:
    seen, right = row.seen(), row.right()
    assert (seen.status, right.status) == row.verdicts, (seen.evidence, right.evidence)
    assert row.says in seen.evidence


def test_remedies_name_what_users_reported() -> None:
    """NaN with paged context FMHA (TensorRT-LLM#2255, #2217), and a recipe can do what they say."""
    for line in ("behaviour.log_probs", "words.same"):
        assert all(issue in remedy(line) for issue in ("#2255", "#2217", "use_paged_context_fmha: disable"))
    wanted = recipe.load("a100-bfloat16", {}, {"trtllm_build": {"use_paged_context_fmha": "disable"}}).recipe
    chosen = flags.arguments(
        plan(wanted, look_up(wanted.model)), "c", "e", output_timing_cache="t", more=wanted.trtllm_build
    )
    assert chosen["use_paged_context_fmha"] == "disable"
