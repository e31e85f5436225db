"""Whole answers to many prompts, a few at a time, in the order of the prompts."""

import sys

from minitron_client import Client, Request

url = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"
prompts: list[str | Request] = ["In the beginning", "The old man"]
prompts.append(Request("And the king said", max_tokens=6, temperature=0.8, seed=7))

with Client(url, deadline_s=60) as client:
    for prompt, answer in zip(prompts, client.generate_batch(prompts, concurrency=2), strict=True):
        asked = prompt.prompt if isinstance(prompt, Request) else prompt
        print(f"{asked} ...{answer.text[:60]!r} ({answer.token_count} tokens)")
