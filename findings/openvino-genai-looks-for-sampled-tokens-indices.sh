#!/bin/sh
# openvino-genai 2026.4.1.0 (openvino 2026.4.1): what is computed behind the last hidden state of a prompt depends on the
# form of the model's last nodes, and on the name of an input.
#
# Of a prompt only the last token's logits are needed, and where the model ends in a MatMul, or in one with an Add behind
# it, the pipeline takes that token's row out before. Where the node behind the MatMul is a Maximum, the output head runs
# over every token of the prompt, without a word. But if such a model has an input called sampled_tokens_indices, the name
# of the one that the pipeline puts in elsewhere, it is filled with the numbers of the rows that are needed, and the model
# can take them itself.
#
# The model here is a table, a token is followed by itself, and the node behind the MatMul tells for how many rows that
# ran: it makes the token of that number the likeliest. Asked with seven times 3, for three tokens.
#
# Seen:
#     an Add behind the MatMul: rows of each step 1 1 1
#     a Maximum: rows of each step 7 1 1
#     a Maximum, and an input sampled_tokens_indices: rows of each step 1 1 1
set -eu
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 openvino-genai==2026.4.1.0
cd "$scratch"
"$scratch/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

sys.modules["openvino_telemetry"] = None
import numpy as np
import openvino as ov
import openvino_genai as genai
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo

WORDS = 16


def ints(*values):
    return op.constant(np.array(values, np.int64))


def model(behind, chooses):
    """``behind`` the MatMul is an Add or a Maximum; ``chooses`` rows by an input of its own. The attention adds nothing."""
    inputs = [op.parameter([-1, -1], np.int64, name=name) for name in ("input_ids", "attention_mask", "position_ids")]
    inputs.append(op.parameter([-1], np.int32, name="beam_idx"))
    if chooses:
        inputs.append(op.parameter([-1], np.int64, name="sampled_tokens_indices"))
    for one in inputs:
        one.output(0).set_names({one.friendly_name})
    ids, mask, positions, beams, *sampled = inputs
    first = op.constant(0, np.int64)
    embedded = op.gather(op.constant(np.eye(WORDS, dtype=np.float32)), ids, first)
    heads = op.transpose(op.reshape(embedded, ints(0, 0, 1, WORDS), True), ints(0, 2, 1, 3))
    batch = op.gather(op.shape_of(ids, "i64"), ints(0), first)
    cached, sinks = [], []
    for kind, now in (("key", heads), ("value", op.multiply(heads, op.constant(np.float32(0))))):
        info = VariableInfo()
        info.data_shape, info.data_type = ov.PartialShape([-1, 1, -1, WORDS]), ov.Type.f32
        info.variable_id = f"past_key_values.0.{kind}present.0.{kind}"
        variable = Variable(info)
        empty = op.broadcast(op.constant(np.float32(0)), op.concat([batch, ints(1, 0, WORDS)], 0))
        cached.append(op.concat([op.gather(op.read_value(empty, variable), beams, first), now], 2))
        sinks.append(op.assign(cached[-1], variable))
    length = op.squeeze(op.gather(op.shape_of(mask, "i64"), ints(1), first), ints(0))
    columns = op.range(first, length, op.constant(1, np.int64), "i64")
    seen = op.less_equal(columns, op.unsqueeze(positions, ints(1, 3)))
    bias = op.select(seen, op.constant(np.float32(0)), op.constant(np.float32(-65504)))
    attended = op.transpose(op.scaled_dot_product_attention(heads, *cached, bias), ints(0, 2, 1, 3))
    hidden = op.add(embedded, op.reshape(attended, ints(0, 0, WORDS), True))
    if sampled:
        hidden = op.gather(op.reshape(hidden, ints(-1, 1, WORDS), False), sampled[0], first)
    logits = op.matmul(hidden, op.constant(np.eye(WORDS, dtype=np.float32)), False, True)
    rows = op.reduce_prod(op.gather(op.shape_of(logits, "i64"), ints(0, 1), first), ints(0), False)
    high, low = op.constant(np.float32(50)), op.constant(np.float32(0))
    logits = behind(logits, op.one_hot(rows, op.constant(WORDS, np.int64), high, low, 0))
    result = op.result(logits)
    result.output(0).set_names({"logits"})
    return ov.Model([result], sinks, inputs)


def generated(behind, chooses):
    ov.save_model(model(behind, chooses), "openvino_model.xml", compress_to_fp16=False)
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = 50
    pipeline = genai.ContinuousBatchingPipeline(".", scheduler, "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
    config = genai.GenerationConfig()
    config.apply_chat_template = False
    config.max_new_tokens = 3
    config.eos_token_id, config.stop_token_ids = 0, {0}
    handle = pipeline.add_request(0, ov.Tensor(np.array([[3] * 7], np.int64)), config)
    found = []
    while pipeline.has_non_finished_requests():
        pipeline.step()
        while handle.can_read():
            found += next(iter(handle.read().values())).generated_ids
    return found


cases = {"an Add behind the MatMul": (op.add, False), "a Maximum": (op.maximum, False),
         "a Maximum, and an input sampled_tokens_indices": (op.maximum, True)}
seen = [generated(*case) for case in cases.values()]
for what, rows in zip(cases, seen):
    print(f"{what}: rows of each step {' '.join(map(str, rows))}")
sys.exit(seen != [[1, 1, 1], [7, 1, 1], [1, 1, 1]])
PYTHON
