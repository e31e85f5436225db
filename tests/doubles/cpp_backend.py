"""Gives the CPU engine's model, copied into a version folder, the manners in which the C++ backend differs from it.

By the contract (model_instance_state.cc, utils.cc of TensorRT-LLM 1.2.0rc8), llmRequest.cpp (119c6e60) and
trtGptModel.h (2e2327b9): an id that is in use may be used again, bad words of one token never come, an embedding bias
decides, too long an output is shortened, a prompt may have all but one token of a sequence (chunked context) whatever
max_input_len the engine was built with, an end id stands for itself alone.
The tokens are still the CPU engine's; where these rules would change them, others are put in their place.
"""

from __future__ import annotations

import json
from pathlib import Path

_READING = """

_plain_row = _row
end_ids.meant_by = lambda end_id, own: frozenset({end_id} if end_id >= 0 else ())


def _refuse_unsupported(row):
    beams = row.integer("beam_width", 1)
    if beams > 1:
        raise Refused(f"Requested beam width {beams} is larger than the configured max beam width 1")


def _row(tensors, index, batch, own_end_ids):
    row = _Row(tensors, index)
    banned = frozenset(word[0] for word in row.words("bad_words_list") if len(word) == 1)
    bias = tensors["embedding_bias"][index].reshape(-1) if row.has_values("embedding_bias") else None
    requests = _plain_row(tensors, index, batch, own_end_ids)
    for request in requests:
        object.__setattr__(request, "banned", banned)
        object.__setattr__(request, "favourite", None if bias is None else int(bias.argmax()))
    return requests
"""
_CONFIG = """

_read = EngineConfig.read


def _read_as_the_runtime(folder):
    config = _read(folder)
    return dataclasses.replace(config, max_input_len=config.max_seq_len - 1)


EngineConfig.read = staticmethod(_read_as_the_runtime)
"""
_ENGINE = """

import dataclasses

_submit = Engine.submit


def _submit_alike(self, request, deliver):
    banned, favourite = getattr(request, "banned", frozenset()), getattr(request, "favourite", None)
    room = self.config.max_seq_len - len(request.prompt)
    if 0 < room < request.max_new_tokens:  # the prompt itself is looked at first
        object.__setattr__(request, "max_new_tokens", room)
    change = {change!r} if list(request.prompt) == {prompt!r} else {{}}
    came = []

    def altered(chunk):
        ids = []
        for token in chunk.token_ids:
            token = change.get(len(came), token) if favourite is None else favourite
            ids.append(token + 1 if token in banned else token)
            came.append(token)
        deliver(dataclasses.replace(chunk, token_ids=tuple(ids)))

    return _submit(self, request, altered)


Engine.submit = _submit_alike
"""


def make_alike(folder: Path, change: Path) -> None:
    """Alter the copied model in ``folder``; ``change`` may name a prompt, a place and the token that comes there."""
    wanted = json.loads(change.read_text()) if change.exists() else {"prompt": None, "place": 0, "token": 0}
    model = folder / "model.py"
    text = model.read_text()
    assert "if request_id and any(" in text
    model.write_text(text.replace("if request_id and any(", "if False and any("))
    with open(folder / "request_tensors.py", "a", encoding="utf-8") as code:
        code.write(_READING)
    with open(folder / "engine_config.py", "a", encoding="utf-8") as code:
        code.write("\n\nimport dataclasses\n" + _CONFIG)
    with open(folder / "cpu_engine.py", "a", encoding="utf-8") as code:
        code.write(_ENGINE.format(change={wanted["place"]: wanted["token"]}, prompt=wanted["prompt"]))
