"""Many streams at once on one connection, with asyncio."""

import asyncio
import sys

from minitron_client import AsyncClient


async def main(url: str) -> None:
    """Continue three prompts side by side."""
    async with AsyncClient(url, deadline_s=60) as client:

        async def ask(prompt: str) -> str:
            return prompt + "".join([chunk.text async for chunk in client.stream(prompt, max_tokens=12)])

        for text in await asyncio.gather(*map(ask, ("In the beginning", "The old man", "And it came to pass"))):
            print(text)


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"))
