"""512 streams at once through one gateway, some of whose clients leave: none lost, none mixed up, nothing left behind.

Each stream's tokens begin at an id of its own, and its text must be the tokenizer's decode of just those ids.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer

from bare_process import Bare, prompt
from conftest import SMALL_MODEL
from gateway_process import Gateway, within

STREAMS, TOKENS, LEAVING = 512, 40, 0.1


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))


def text(first: int) -> str:
    lead = tokenizer().encode("x", add_special_tokens=False).ids
    return str(tokenizer().decode([*lead, *range(first, first + TOKENS)])).removeprefix("x")


async def stream(address: str, number: int, leaves: bool) -> str | None:
    """The text of one stream; None where its client leaves in the middle, if there are so many events (a busy machine
    puts more text in each)."""
    host, _, port = address.partition(":")
    asked = prompt(tokens=TOKENS, interval_ms=25, first_id=300 + number)
    body = json.dumps({"model": "minitron", "prompt": asked, "max_tokens": TOKENS, "stream": True})
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
    texts, done = [], False
    try:
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                texts.append(json.loads(line[6:])["choices"][0]["text"])
                if leaves and len(texts) == 1 + number % 7:
                    return None
            elif line.startswith(b"data: [DONE]"):
                done = True
                break
    finally:
        writer.close()
    assert done, f"stream {number} was lost after {len(texts)} events"
    return None if leaves else "".join(texts)


async def wave(address: str, leaving: set[int]) -> list[str | None]:
    return await asyncio.gather(*(stream(address, number, number in leaving) for number in range(STREAMS)))


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["1", "20ms"])
def test_five_hundred_streams_some_of_which_leave(tmp_path: Path, interval: str) -> None:
    server = Bare(tmp_path, "--tokenizer", str(SMALL_MODEL))
    gateway = Gateway("--upstream", server.url, "--stream-interval", interval)
    chance = random.Random(18)
    memory = []
    try:
        for _ in range(3):
            leaving = set(chance.sample(range(STREAMS), int(LEAVING * STREAMS)))
            found = asyncio.run(wave(gateway.address, leaving))
            for number, one in enumerate(found):
                assert one == (None if number in leaving else text(300 + number)), number
            assert within(30, lambda: gateway.metric("minitron_gateway_streams") == 0)
            assert within(30, lambda: len(server.events("end")) == len(server.events("request")))
            memory.append(psutil.Process(gateway.process.pid).memory_info().rss)
        assert not server.events("cancel")
        assert memory[2] < memory[1] * 1.05  # a first wave warms allocators
        assert gateway.end()[0] == 0
    finally:
        gateway.process.kill()
        server.end()
