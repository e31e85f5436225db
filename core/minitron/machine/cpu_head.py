"""The screened output head of a CPU engine: the names that its graph gives to what others look for.

A rendered repository holds a copy for the CPU engine.
"""

from __future__ import annotations

from minitron.machine.openvino import opset13, ov

#: Friendly name of the hidden states [batch, tokens, hidden] that go into the head.
HIDDEN = "head.hidden"
#: Friendly name of the 16-bit rows [vocab, hidden], as a Convert.
WEIGHTS = "head.weights"
#: The input that says which rows get logits; the name that openvino_genai 2026.4 fills.
ROWS = "sampled_tokens_indices"


def without_screen(model: ov.Model) -> ov.Model:
    """The model with its 16-bit head in place of the screen: logits [batch, tokens, vocab]; as it is without one."""
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    if ROWS not in nodes:
        return model
    logits = opset13.matmul(nodes[HIDDEN], nodes[WEIGHTS], False, True)
    logits.output(0).set_names({"logits"})
    inputs = [node for node in model.get_parameters() if node.get_friendly_name() != ROWS]
    return ov.Model([opset13.result(logits)], model.get_sinks(), inputs, model.get_friendly_name())
