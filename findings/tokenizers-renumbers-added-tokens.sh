#!/bin/sh
# tokenizers 0.23.3 (transformers 5.24.0 loads through it): the id that tokenizer.json gives an added token does not count.
#
# An added token whose "id" does not follow directly on the vocabulary gets the next free id instead, without an error or
# a warning. A model that was trained with the id of the file is asked with another token, and what is saved again has
# the other id in it. Here the file says 10, and the vocabulary has three pieces.
#
# Seen:
#     the file says <x> is token 10
#     tokenizers makes it 3, encodes "a<x>b" as [0, 3, 1] and saves it as 3
#     transformers makes it 3
set -eu
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 transformers==5.24.0
cd "$scratch"
TRANSFORMERS_VERBOSITY=error "$scratch/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
import sys

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

added = {"id": 10, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []}
with open("tokenizer.json", "w", encoding="utf-8") as file:
    json.dump({"version": "1.0", "added_tokens": [added], "model": model}, file)
loaded = Tokenizer.from_file("tokenizer.json")
found, ids = loaded.token_to_id("<x>"), loaded.encode("a<x>b").ids
saved = json.loads(loaded.to_str())["added_tokens"][0]["id"]
transformers_id = PreTrainedTokenizerFast.from_pretrained(".").convert_tokens_to_ids("<x>")
print("the file says <x> is token 10")
print(f'tokenizers makes it {found}, encodes "a<x>b" as {ids} and saves it as {saved}')
print(f"transformers makes it {transformers_id}")
sys.exit((found, ids, saved, transformers_id) != (3, [0, 3, 1], 3, 3))
PYTHON
