"""Clients in a closed loop, half of which leave in the middle; the others' answers must be those known beforehand.

They are strangers: no client of ours, which would end its request with a ``stop``. A way of leaving is one of

* gRPC (ModelStreamInfer, a call for each request): ``deadline`` of the call, ``cancel`` of the call, ``close`` of its
  channel, ``reset`` of its socket;
* HTTP (generate_stream): ``hangup``, the connection closed in good order, and ``abort``, reset.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import http2
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from minitron.text.channel import INFER_RPC
from minitron.text.tensors import datatype, from_bytes, to_bytes

TEXT, TOKENS = "tensorrt_llm_bls", "tensorrt_llm"
GRPC_WAYS, HTTP_WAYS = ("deadline", "cancel", "close", "reset"), ("hangup", "abort")
_LONGEST_S = 300.0  # a stream that takes longer hangs


@dataclass(frozen=True)
class Known:
    """A question and, from each model that was asked for it, its greedy answer of ``tokens`` tokens."""

    prompt: str
    ids: tuple[int, ...]
    tokens: int
    answers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tally:
    """What became of the requests. ``middle``: those left between first and last response; ``wrong``: what should not
    have been, in words; ``response``: when the last one came (perf_counter)."""

    requests: int = 0
    whole: int = 0
    left: Counter[str] = field(default_factory=Counter)
    middle: int = 0
    responses: int = 0
    wrong: list[str] = field(default_factory=list)
    response: float = field(default_factory=time.perf_counter)

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "requests": self.requests, "whole": self.whole, "left": dict(sorted(self.left.items())),
            "left_in_the_middle": self.middle, "responses": self.responses, "wrong": self.wrong[:20],
        }  # fmt: skip


@dataclass(frozen=True)
class Habits:
    """What clients do: the ``share`` of them that leaves does it in these ``ways``, half of them between ``short_s``
    seconds after asking, as with a tight deadline, and half anywhere in the answer."""

    models: Sequence[str] = (TEXT, TOKENS)
    ways: Sequence[str] = GRPC_WAYS + HTTP_WAYS
    share: float = 0.5
    short_s: tuple[float, float] = (0.1, 0.4)


class Clients:
    """Strangers to the server at ``urls``."""

    def __init__(self, urls: dict[str, str], known: Sequence[Known], habits: Habits, seed: int) -> None:
        self._urls, self._known, self._habits, self._seed = urls, known, habits, seed
        self.tally = Tally()
        self.open: set[str] = set()  # streams that have not ended
        self._usual_s = [0.0, 1.0]  # until an answer begins and ends

    async def run(self, streams: int, until: Callable[[], bool]) -> None:
        """So many clients at once, each asking again and again, until ``until`` says so; returns with the last end."""
        await asyncio.gather(*(self._client(random.Random(f"{self._seed} {n}"), until) for n in range(streams)))

    async def learn(self) -> None:
        """Ask every model for every answer, one after the other, of an idle server."""
        async with self._new_channel() as channel:
            for known in self._known:
                for model in (TEXT, TOKENS):
                    known.answers[model] = _joined([part async for part in answer(channel, model, known)])

    async def _client(self, chance: random.Random, until: Callable[[], bool]) -> None:
        async with self._new_channel() as channel:
            while not until():
                habits = self._habits
                model, known, way = chance.choice(habits.models), chance.choice(self._known), chance.choice(habits.ways)
                when = chance.choice((habits.short_s, self._usual_s))
                after_s = chance.uniform(*when) if chance.random() < habits.share else None
                await self._ask(channel, model, known, way, after_s)

    async def _ask(self, channel: Any, model: str, known: Known, way: str, after_s: float | None) -> None:
        """One request, left after ``after_s`` in this way, or read to its end."""
        tally, began = self.tally, time.perf_counter()
        parts: list[Any] = []
        tally.requests += 1
        name = f"{way} {model} {uuid.uuid4().hex}"
        self.open.add(name)
        try:
            async with aclosing(self._answer(channel, model, known, way, after_s)) as answer:
                async for part in answer:
                    tally.response = time.perf_counter()
                    if not parts:
                        self._note(0, tally.response - began)
                    parts.append(part)
                    tally.responses += 1
            self._note(1, tally.response - began)
            tally.whole += 1
            self._judge(name, known.answers.get(model), _joined(parts), whole=True)
        except _Left:
            tally.left[way] += 1
            tally.middle += bool(parts)
            self._judge(name, known.answers.get(model), _joined(parts), whole=False)
        except (grpc.RpcError, OSError, EOFError, ValueError, RuntimeError) as error:
            told = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else repr(error)
            self.wrong(f"{name} failed after {len(parts)} responses: {told}")
            await asyncio.sleep(0.1)  # not to flood a server that is gone
        finally:
            self.open.discard(name)

    def _note(self, which: int, took_s: float) -> None:
        self._usual_s[which] += (took_s - self._usual_s[which]) / 16

    def wrong(self, what: str) -> None:
        """Note what should not have been."""
        self.tally.wrong.append(what)

    def _judge(self, name: str, known: Any, answer: Any, *, whole: bool) -> None:
        if known is None or not (whole or answer):
            return
        if answer != (known if whole else known[: len(answer)]):
            self.wrong(f"{name} was answered {answer[:80]!r} and not {known[:80]!r}")

    async def _answer(
        self, channel: Any, model: str, known: Known, way: str, after_s: float | None
    ) -> AsyncGenerator[Any, None]:
        """What the model sends; raises _Left when the time has come."""
        if way in HTTP_WAYS:
            parts = _over_http(self._urls["http"], model, known, way, after_s)
        elif way == "reset" and after_s is not None:
            parts = _over_socket(self._urls["grpc"], model, known, after_s)
        elif way == "close" and after_s is not None:
            own = self._new_channel()  # those that stay keep theirs
            parts = answer(own, model, known, way, after_s)
        else:
            parts = answer(channel, model, known, way, after_s)
        async with aclosing(parts):
            async for part in parts:
                yield part

    def _new_channel(self) -> Any:
        """With a connection of its own."""
        return grpc.aio.insecure_channel(self._urls["grpc"], options=[("grpc.use_local_subchannel_pool", 1)])


class _Left(Exception):
    """The client has left."""


async def answer(
    channel: Any, model: str, known: Known, way: str = "", after_s: float | None = None
) -> AsyncGenerator[Any, None]:
    """What a model answers over gRPC, part by part; left after ``after_s`` in this way, where there is one."""
    infer = channel.unary_stream(
        INFER_RPC, pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
    )
    has_deadline = way == "deadline" and after_s is not None
    call = infer(_message(model, known), timeout=after_s if has_deadline else _LONGEST_S)
    leaving: asyncio.TimerHandle | None = None
    closing: asyncio.Task[None] | None = None
    left = False

    def leave() -> None:
        nonlocal left, closing
        left = True
        if way == "cancel":
            call.cancel()
        else:
            closing = asyncio.get_running_loop().create_task(channel.close())

    if after_s is not None and not has_deadline:
        leaving = asyncio.get_running_loop().call_later(after_s, leave)
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            if response.error_message:
                raise RuntimeError(response.error_message)
            if response.infer_response.outputs:
                yield _part(response.infer_response)
        if left:  # at its very end
            raise _Left
    except asyncio.CancelledError:
        if not left:
            raise
        raise _Left from None
    except (grpc.aio.AioRpcError, grpc.aio.UsageError):  # the latter of a channel that is closed
        if left or (has_deadline and await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED):
            raise _Left from None
        raise
    finally:
        if leaving is not None:
            leaving.cancel()
        if way == "close" and after_s is not None:
            await (closing or channel.close())


async def _over_socket(url: str, model: str, known: Known, after_s: float) -> AsyncGenerator[Any, None]:
    """gRPC in plain bytes, so that the socket can be reset under it; what comes is not read closely."""
    message = _message(model, known).SerializeToString()
    reader, writer = await _connect(url)
    try:
        writer.write(http2.request(INFER_RPC, url, message))
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_read_on(reader), after_s)
    finally:
        _reset(writer)
    never: tuple[Any, ...] = ()
    for one in never:  # as the other ways, a generator of responses
        yield one
    raise _Left


async def _read_on(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        pass


async def _over_http(url: str, model: str, known: Known, way: str, after_s: float | None) -> AsyncGenerator[Any, None]:
    body = json.dumps(_body(model, known)).encode()
    head = f"POST /v2/models/{model}/generate_stream HTTP/1.1\r\nHost: {url}\r\nContent-Type: application/json\r\n"
    reader, writer = await _connect(url)
    leave = partial(_reset, writer) if way == "abort" else writer.close
    leaving = asyncio.get_running_loop().call_later(_LONGEST_S if after_s is None else after_s, leave)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while (line := await reader.readline()) != b"0\r\n":
            if not line.endswith(b"\n"):
                raise EOFError("the connection ended before the last response")
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                yield event["text_output"] if model == TEXT else _ids(event["output_ids"], event["sequence_length"])
    except (EOFError, OSError):
        if after_s is not None and writer.is_closing():
            raise _Left from None
        raise
    finally:
        leaving.cancel()
        writer.close()


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = url.rpartition(":")
    return await asyncio.open_connection(host, int(port))


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a reset, as socket(7) says that lingering for no time does."""
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _message(model: str, known: Known) -> Any:
    message = pb.ModelInferRequest(model_name=model, id=uuid.uuid4().hex)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, array in _tensors(model, known).items():
        message.inputs.add(name=name, datatype=datatype(array), shape=array.shape)
        message.raw_input_contents.append(to_bytes(array))
    return message


def _tensors(model: str, known: Known) -> dict[str, Any]:
    length, streams = np.array([[known.tokens]], np.int32), np.array([[True]])
    if model == TEXT:  # no end before the last token, as tensorrt_llm itself knows none unless it is told one
        text = np.array([[known.prompt.encode()]], dtype=object)
        return {"text_input": text, "max_tokens": length, "min_tokens": length, "stream": streams}
    ids = np.array([known.ids], np.int32)
    lengths = np.array([[len(known.ids)]], np.int32)
    return {"input_ids": ids, "input_lengths": lengths, "request_output_len": length, "streaming": streams}


def _body(model: str, known: Known) -> dict[str, Any]:
    if model == TEXT:
        return {"text_input": known.prompt, "max_tokens": known.tokens, "min_tokens": known.tokens, "stream": True}
    return {"input_ids": list(known.ids), "input_lengths": len(known.ids), "request_output_len": known.tokens,
            "streaming": True}  # fmt: skip


def _part(infer: Any) -> Any:
    """The text or the ids of one response."""
    found = {
        output.name: from_bytes(output.datatype, tuple(output.shape), raw)
        for output, raw in zip(infer.outputs, infer.raw_output_contents, strict=True)
    }
    if "text_output" in found:
        return str(found["text_output"].item().decode())
    return _ids(found["output_ids"].reshape(-1).tolist(), int(found["sequence_length"].item()))


def _ids(ids: Any, length: int) -> tuple[int, ...]:
    return tuple([ids] if isinstance(ids, int) else ids)[:length]


def _joined(parts: Sequence[Any]) -> Any:
    """The whole of texts, or of rows of ids; "" of none."""
    if parts and isinstance(parts[0], tuple):
        return tuple(token for part in parts for token in part)
    return "".join(parts)
