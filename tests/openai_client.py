"""OpenAI's own client, as its users call it; run by the Python of an environment that has it (``make test-clients``).

``openai_client.py URL`` prints one JSON document of what it got.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai  # of the clients' environment

PROMPT = "In the beginning God created"


def asked(url: str) -> dict[str, Any]:
    """What the calls gave; ``error`` is the class and the status of what was raised."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    whole = client.completions.create(model="minitron", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=1)
    stream = client.completions.create(
        model="minitron",
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    parts = list(stream)
    extra = client.completions.create(
        model="minitron", prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"ignore_eos": True, "min_tokens": 12}
    )
    return {
        "models": [model.id for model in client.models.list()],
        "whole": whole.choices[0].text,
        "tokens": "".join(whole.choices[0].logprobs.tokens),
        "finish": whole.choices[0].finish_reason,
        "usage": whole.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}),
        "streamed": "".join(part.choices[0].text for part in parts if part.choices),
        "streamed_usage": parts[-1].usage.completion_tokens,
        "async": asyncio.run(asked_async(url)),
        "extra": extra.choices[0].text,
        "chat": raised(lambda: client.chat.completions.create(
            model="minitron", messages=[{"role": "user", "content": "Hello"}])),
        "no_model": raised(lambda: client.completions.create(model="gpt-5", prompt="x")),
        "too_long": raised(lambda: client.completions.create(model="minitron", prompt="x", max_tokens=10**6)),
    }  # fmt: skip


async def asked_async(url: str) -> str:
    """The same text by the asynchronous client, streamed."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        stream = await client.completions.create(
            model="minitron", prompt=PROMPT, max_tokens=12, temperature=0, stream=True
        )
        return "".join([part.choices[0].text async for part in stream])


def broken(url: str, prompt: str) -> dict[str, Any]:
    """A stream that breaks: the text until then, and what was raised."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    texts: list[str] = []

    def read() -> None:
        for part in client.completions.create(model="minitron", prompt=prompt, stream=True):
            texts.append(part.choices[0].text)

    return {"error": raised(read), "text": "".join(texts)}


def raised(call: Any) -> list[Any]:
    """Class, status where there is one, and message of what a call raises."""
    try:
        call()
    except openai.APIError as error:
        return [type(error).__name__, getattr(error, "status_code", None), str(error)]
    return ["nothing", None, ""]


if __name__ == "__main__":
    found = broken(*sys.argv[1:3]) if len(sys.argv) > 2 else asked(sys.argv[1])
    print(json.dumps(found))
