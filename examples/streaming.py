"""Print the answer while it is generated, and say how long the first token took."""

import sys

from minitron_client import Client

url = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"

with Client(url) as client, client.stream("In the beginning", max_tokens=24) as stream:
    for chunk in stream:
        print(chunk.text, end="", flush=True)

timing = stream.response.timing
if timing.ttft_ns is not None:  # None where the server does not count tokens
    print(f"\nfirst token after {timing.ttft_ns / 1e6:.1f} ms")
