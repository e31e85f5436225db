#!/bin/sh
# transformers 5.24.0: a rope_scaling that scales nothing takes the base of the rotation away.
#
# transformers 5 reads rope_parameters; rope_scaling is the name of before, which it still takes. Where a config.json has
# both, as one has that shall serve versions 4 and 5, rope_scaling replaces rope_parameters as a whole, even if it only
# says that there is no scaling ({"rope_type": "default"}): the base of 500,000 is gone, and so is the rotated share;
# the defaults of the class take their place. Without an error or a warning the model answers with other tokens.
#
# Seen:
#     LlamaConfig: base 500000.0, beside a rope_scaling of type "default" 10000.0
#     NemotronConfig: share 0.25, beside a rope_scaling of type "default" 0.5
set -eu
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
cd "$scratch"
"$scratch/venv/bin/python" - 2>log <<'PYTHON'
import json
import sys

from transformers import LlamaConfig, NemotronConfig


def read(kind, rope, **more):
    with open("config.json", "w", encoding="utf-8") as file:
        json.dump({"model_type": kind.model_type, "rope_parameters": rope} | more, file)
    return kind.from_pretrained(".").rope_parameters


found = []
for kind, word, key, value in (
    (LlamaConfig, "base", "rope_theta", 500000.0),
    (NemotronConfig, "share", "partial_rotary_factor", 0.25),
):
    rope = {"rope_type": "default", key: value}
    alone, beside = read(kind, rope)[key], read(kind, rope, rope_scaling={"rope_type": "default"})[key]
    print(f'{kind.__name__}: {word} {alone}, beside a rope_scaling of type "default" {beside}')
    found.append((alone, beside))
sys.exit(found != [(500000.0, 10000.0), (0.25, 0.5)])
PYTHON
if grep -v "PyTorch was not found" log; then
    echo "transformers says something about it now"
    exit 1
fi
