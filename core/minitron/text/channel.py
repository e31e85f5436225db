"""What every gRPC channel to a Triton needs: address, key, options, and how long a silent line is believed in.

A request may wait for minutes without a byte on its line: behind a busy engine, for a long prompt. Only a question can
tell such a line from a dead one, and gRPC has it: a keepalive ping, which the other end's gRPC answers by itself. But a
server counts pings that come too often while it has nothing to send, and after the third ends the connection with
``too_many_pings`` (C-core: one every 300 s is allowed; gRPC's ``doc/keepalive.md``). 'minitron serve' allows one every
KEEPALIVE_S; for servers that somebody else started the client's default is more than those 300 s.
"""

from __future__ import annotations

from minitron.text import proxy

#: Where a Triton listens that was told nothing else (tritonserver --help).
GRPC_PORT, HTTP_PORT, METRICS_PORT = 8001, 8000, 8002
DEFAULT_URL = f"127.0.0.1:{GRPC_PORT}"
INFER_RPC = "/inference.GRPCInferenceService/ModelStreamInfer"
#: Name of the header that carries the API key of 'minitron serve' over HTTP; over gRPC ``key_header`` of it.
API_KEY = "api-key"
#: As often as a server of 'minitron serve' may be asked, calls or no calls; and any server that answers other questions
#: on the same connection more often than this, because every answer sets its count of pings back to none.
KEEPALIVE_S = 10.0
#: As often as any server of gRPC C-core (each Triton) may be asked, with something for the clocks of two machines.
PATIENT_KEEPALIVE_S = 310.0
#: A busy machine takes seconds for an answer; gRPC's own default.
_ANSWER_S = 20.0

Options = tuple[tuple[str, int], ...]


def key_header(name: str) -> str:
    """The gRPC header of a key that Triton's ``--grpc-restricted-protocol=PROTOCOLS:NAME=VALUE`` asks for."""
    return f"triton-grpc-protocol-{name}"


def options(url: str, keepalive_s: float, *, proxies: bool) -> Options:
    """For a channel to HOST:PORT that asks a silent server every ``keepalive_s`` seconds (0: never) while it has calls.

    A server that does not answer within twice that, at most 20 s, is dead, and its calls end with UNAVAILABLE.
    ``proxies``: whether those of the environment are obeyed, where the address is not a loopback one.
    """
    return (
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        # A server that restarts is found again within two seconds, not within gRPC's two minutes; one that accepts the
        # connection and says nothing is given up after five (the second name is gRPC's for that time, too).
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5000),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # Channels to one address would share one connection; closing one must not touch another.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", int(proxies and proxy.of_grpc(url) is not None)),
        *_keepalive(keepalive_s),
    )


def _keepalive(every_s: float) -> Options:
    if not every_s:
        return ()
    answer_ms = round(min(2 * every_s, _ANSWER_S) * 1000)
    return (
        ("grpc.keepalive_time_ms", round(every_s * 1000)),
        # The second name counts: gRPC (1.60 to 1.85) waits its default of 60 s, whatever the first one says.
        ("grpc.keepalive_timeout_ms", answer_ms),
        ("grpc.http2.ping_timeout_ms", answer_ms),
        ("grpc.http2.max_pings_without_data", 0),  # else the third is not sent, or late
    )
