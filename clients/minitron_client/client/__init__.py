"""The gRPC client: one request model, one response model, the same names blocking and asynchronous.

::

    from minitron_client.client import Client

    with Client("127.0.0.1:8001") as client:
        for chunk in client.stream("The old man", max_tokens=32):
            print(chunk.text, end="", flush=True)

``AsyncClient`` has the same methods with ``async``. Errors are those of ``minitron.errors`` below ClientError.

``aio`` moves the messages; ``blocking`` runs it in a thread. What does no input or output stands beside them:
``request`` (what is asked), ``dialect`` (tensors of the four kinds of model), ``answer`` (what came back, and when),
``endpoint`` (where and how to connect).
"""

import os

# gRPC's own handling of forks cannot stop grpc.aio's threads, gives up in the middle (1.85), and crashes every third
# child; without it a child is well as long as it leaves alone what it inherited (see ``blocking``). What the user has
# set stays.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

from minitron_client.client.aio import AsyncClient
from minitron_client.client.answer import Chunk, Output, Response
from minitron_client.client.blocking import Client, Stream
from minitron_client.client.endpoint import ApiKey, Endpoint, Retry, Tls
from minitron_client.client.request import Request
from minitron_client.client.stream import AsyncStream
from minitron_client.client.timing import Timing

__all__ = [
    "ApiKey", "AsyncClient", "AsyncStream", "Chunk", "Client", "Endpoint", "Output",
    "Request", "Response", "Retry", "Stream", "Timing", "Tls",
]  # fmt: skip
