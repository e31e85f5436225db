"""The asynchronous client against a bare process that speaks Triton's protocol (``bare_triton``).

Expected texts and counts follow from what each prompt asks for.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable

import pytest

from bare_process import Bare, prompt, unused_port, words
from minitron.errors import Cancelled, DeadlineExceeded, InvalidRequest, NotReady, Rejected, StreamBroken
from minitron_client.client import AsyncClient


def test_async_256_streams_on_one_client(bare: Bare) -> None:
    async def main() -> list[str]:
        async with AsyncClient(bare.url) as client:

            async def read(number: int) -> str:
                stream = client.stream(prompt(tokens=number % 16 + 1, interval_ms=5), max_tokens=99)
                return "".join([chunk.text async for chunk in stream])

            return await asyncio.gather(*map(read, range(256)))

    assert asyncio.run(main()) == [words(number % 16 + 1) for number in range(256)]


def test_async_nothing_is_left_after_1000_requests(bare: Bare) -> None:
    async def main(count: int) -> tuple[int, int, int]:
        async with AsyncClient(bare.url) as client:
            for number in range(count):
                stream = client.stream(prompt(tokens=2, interval_ms=0))
                if number % 10:
                    assert len([chunk async for chunk in stream]) == 4
                else:
                    await stream.__anext__()
                    await stream.close()
        await asyncio.sleep(0.3)
        return threading.active_count(), len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())

    threads, files, tasks = asyncio.run(main(1))
    more = asyncio.run(main(1000))
    assert more[0] <= threads and more[1] <= files + 2 and more[2] == tasks == 1  # the one that counts


def test_async_generate_batch_and_questions(bare: Bare) -> None:
    async def main() -> None:
        async with AsyncClient(bare.url) as client:
            answers = await client.generate_batch([prompt(tokens=n) for n in (3, 1, 2)], concurrency=2)
            assert [one.token_count for one in answers] == [3, 1, 2]
            assert await client.is_ready() and (await client.metadata())["version"] == "2.51.0"
            assert (await client.config("ensemble"))["platform"] == "ensemble"
            with pytest.raises(Rejected):
                await client.generate_batch([prompt(reject_times=9)])

    asyncio.run(main())


@pytest.mark.parametrize("model", ["tensorrt_llm_bls", "ensemble"])
@pytest.mark.parametrize("leave", ["break", "with", "cancel", "task"])
def test_async_leaving_cancels(bare: Bare, model: str, leave: str) -> None:
    async def main() -> str:
        async with AsyncClient(bare.url) as client:
            stream = client.stream(prompt(tokens=10_000), max_tokens=10_000, model=model)
            if leave == "break":
                async for _ in stream:
                    break
            elif leave == "with":
                async with stream:
                    await stream.__anext__()
            elif leave == "cancel":
                await stream.__anext__()
                asyncio.get_running_loop().call_later(0.05, stream.cancel)
                with pytest.raises(Cancelled):
                    async for _ in stream:
                        pass
            else:
                begun = asyncio.Event()

                async def read() -> None:
                    async with stream:
                        async for _ in stream:
                            begun.set()

                task = asyncio.ensure_future(read())
                await begun.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            return stream.request_id

    request_id = asyncio.run(main())
    bare.wait_for("stop" if model == "ensemble" else "cancel", request_id)
    assert model != "ensemble" or not bare.events("cancel", request_id)


@pytest.mark.parametrize("model", ["tensorrt_llm_bls", "ensemble"])
def test_async_deadline_and_faults(bare: Bare, model: str) -> None:
    async def main() -> None:
        async with AsyncClient(bare.url, model=model, deadline_s=5) as client:
            with pytest.raises(DeadlineExceeded):
                await client.generate(prompt(silent=True), deadline_s=0.3)
            with pytest.raises(InvalidRequest):
                await client.generate(prompt(error="Prompt length (9) exceeds maximum input length (8)."))
            assert (await client.generate(prompt(tokens=3, reject_times=1))).text == words(3)
        async with AsyncClient(f"127.0.0.1:{unused_port()}", deadline_s=5) as client:
            with pytest.raises(NotReady):
                await client.generate("Hi")
            assert not await client.is_live()

    asyncio.run(main())


def test_async_server_dies_in_the_middle(start_bare: Callable[..., Bare]) -> None:
    async def main(url: str) -> None:
        async with AsyncClient(url) as client:
            with pytest.raises(StreamBroken):
                async for _ in client.stream(prompt(die_after=2)):
                    pass

    asyncio.run(main(start_bare().url))
