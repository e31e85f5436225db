"""Many streams at once through one way to the tokens; one JSON line with what they gave.

    python benches/front_client.py tensorrt_llm|tensorrt_llm_bls|http ADDRESS STREAMS TOKENS SPREAD_S

The streams start evenly over SPREAD_S seconds, 0: all at once.
The gRPC ways are a raw ``grpc.aio`` loop, the HTTP way raw asyncio streams: as little client as can be.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
_PROMPT = "In the beginning God created the heaven and the earth"


async def by_grpc(model: str, address: str, streams: int, tokens: int, gap_s: float) -> list[float]:
    """Seconds to the first token of each stream."""
    async with grpc.aio.insecure_channel(address) as channel:
        infer = channel.unary_stream(
            _INFER, pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
        )

        async def one(number: int) -> float:
            await asyncio.sleep(number * gap_s)
            began, first = time.perf_counter(), 0.0
            async for response in infer(_request(model, f"{number}", tokens)):
                assert not response.error_message, response.error_message
                if not first and response.infer_response.outputs:
                    first = time.perf_counter() - began
            return first

        return await asyncio.gather(*(one(number) for number in range(streams)))


def _request(model: str, request_id: str, tokens: int) -> Any:
    request = pb.ModelInferRequest(model_name=model, id=request_id)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    if model == "tensorrt_llm":
        _add(request, "input_ids", "INT32", np.arange(300, 320, dtype=np.int32).reshape(1, -1))
        _add(request, "input_lengths", "INT32", np.array([[20]], np.int32))
        _add(request, "request_output_len", "INT32", np.array([[tokens]], np.int32))
        _add(request, "streaming", "BOOL", np.array([[True]]))
        for name in ("output_ids", "sequence_length"):
            request.outputs.add(name=name)
    else:
        text = _PROMPT.encode()
        request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
        request.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
        _add(request, "max_tokens", "INT32", np.array([[tokens]], np.int32))
        _add(request, "stream", "BOOL", np.array([[True]]))
        request.outputs.add(name="text_output")
    return request


def _add(request: Any, name: str, kind: str, array: Any) -> None:
    request.inputs.add(name=name, datatype=kind, shape=array.shape)
    request.raw_input_contents.append(array.tobytes())


async def by_http(address: str, streams: int, tokens: int, gap_s: float) -> list[float]:
    """The same through the gateway."""
    host, _, port = address.partition(":")
    body = json.dumps({"model": "minitron", "prompt": _PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-length: {len(body)}\r\n\r\n"

    async def one(number: int) -> float:
        await asyncio.sleep(number * gap_s)
        reader, writer = await asyncio.open_connection(host, int(port))
        began, first, last = time.perf_counter(), 0.0, b""
        writer.write((head + body).encode())
        while b"data: [DONE]" not in last:
            chunk = await reader.read(65536)
            assert chunk, last
            if not first and b"data: " in chunk:
                first = time.perf_counter() - began
            last = last[-400:] + chunk
        assert b'"finish_reason": "length"' in last, last
        writer.close()
        return first

    return await asyncio.gather(*(one(number) for number in range(streams)))


def main() -> None:
    """Run one way."""
    way, address, streams, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    gap_s = float(sys.argv[5]) / streams
    began = time.perf_counter()
    if way == "http":
        firsts = asyncio.run(by_http(address, streams, tokens, gap_s))
    else:
        firsts = asyncio.run(by_grpc(way, address, streams, tokens, gap_s))
    print(json.dumps({"seconds": time.perf_counter() - began, "ttft_s": firsts, "cpu_s": time.process_time()}))


if __name__ == "__main__":
    main()
