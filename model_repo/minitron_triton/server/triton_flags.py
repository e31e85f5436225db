"""Flags of ``tritonserver`` that the user gives behind ``--``: read, and put among those that the toolkit gives.

Names: ``tritonserver --help`` of 2.51.0. A name that is not known here is handed on: a newer server may have it, and
any server refuses by itself what it does not know. Values are in no message and no representation: they may be secret.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from minitron.errors import UsageError

_LOADED = "which models are loaded, and how, is the repository's; change it with 'minitron render'"
_LOG = "the supervisor reads the server's log as it is, and 'minitron status' says where that lies"
_OPEN = "it would answer without TLS and without the API key"
_TLS = "give --tls-cert, --tls-key and --tls-ca"
#: What the toolkit sets, or must not be otherwise, and what to do in place of it.
_OURS = {
    "model-repository": "give the folder as DIR", "model-store": "give the folder as DIR",
    "model-control-mode": _LOADED, "load-model": _LOADED, "repository-poll-secs": _LOADED, "model-namespacing": _LOADED,
    "disable-auto-complete-config": _LOADED, "strict-model-config": _LOADED,
    "grpc-address": "give --host", "http-address": "give --host", "metrics-address": "give --host",
    "grpc-port": "give --grpc-port", "http-port": "give --http-port", "metrics-port": "give --metrics-port",
    "reuse-grpc-port": "a server has its ports alone", "reuse-http-port": "a server has its ports alone",
    "allow-grpc": "the text model asks its server over gRPC", "allow-http": "the supervisor asks its server over HTTP",
    "exit-timeout-secs": "give --exit-timeout",
    "log-verbose": "give --verbose",
    "log-format": _LOG, "log-file": _LOG, "log-info": _LOG, "log-warning": _LOG, "log-error": _LOG,
    "grpc-use-ssl": _TLS, "grpc-use-ssl-mutual": _TLS,
    "grpc-server-cert": "give --tls-cert", "grpc-server-key": "give --tls-key", "grpc-root-cert": "give --tls-ca",
    "grpc-restricted-protocol": "give --api-key-file", "http-restricted-api": "give --api-key-file",
    "allow-sagemaker": _OPEN, "allow-vertex-ai": _OPEN,
    "backend-directory": "the backends are those of the server",
    "backend-config=python,shm-region-prefix-name": "every server has names of its own",
    "help": "it starts no server; ask that tritonserver itself",
}  # fmt: skip
#: Flags that may stand several times, each time for another setting.
_REPEATABLE = (
    "backend-config", "cache-config", "trace-config", "metrics-config", "host-policy", "rate-limit-resource",
    "cuda-memory-pool-byte-size", "cuda-virtual-address-size", "model-load-gpu-limit", "trace-level",
)  # fmt: skip
_SECRET = re.compile(r"(?:password|secret|token|credential)[^=]*=(?P<value>.+)", re.IGNORECASE | re.DOTALL)


def read(words: Sequence[str]) -> tuple[str, ...]:
    """The flags, each as ``--name=value`` or ``--name``; raises UsageError for what cannot be handed on."""
    flags: list[str] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            flags.append(name.replace("_", "-") + equals + value)
        elif flags and "=" not in flags[-1]:
            flags[-1] += f"={word}"
        else:
            where = f"behind {_name(flags[-1])}" if flags else "at the beginning"
            raise UsageError(f"behind '--' stand flags of tritonserver, --name=value or --name value; {where} is "
                             "a word that belongs to none")  # fmt: skip
    _check(flags)
    return tuple(flags)


def _check(flags: Sequence[str]) -> None:
    seen: set[str] = set()
    for flag in flags:
        name = _name(flag)
        for ours, remedy in _OURS.items():
            if flag == f"--{ours}" or flag.startswith(f"--{ours}="):
                raise UsageError(f"{name} behind '--' cannot be had, minitron has its own: {remedy}")
        if meant := _abbreviated(name.removeprefix("--")):
            raise UsageError(f"{name} behind '--' must be written out: tritonserver may take it for --{meant}")
        if _setting(flag) in seen:
            raise UsageError(f"{name} stands behind '--' twice; give one of them")
        seen.add(_setting(flag))


def _abbreviated(name: str) -> str | None:
    """The flag of ours that getopt_long takes this one for, if it is no flag by itself."""
    if name in DEFAULTS or name in _REPEATABLE:
        return None
    known = (*(ours.partition("=")[0] for ours in _OURS), *DEFAULTS)
    return next((ours for ours in known if ours.startswith(name)), None)


def _name(flag: str) -> str:
    return flag.partition("=")[0]


def _setting(flag: str) -> str:
    """What a flag sets: its name, and where that may stand several times, which of its settings."""
    name, _, value = flag.partition("=")
    if name.removeprefix("--") not in _REPEATABLE:
        return name
    setting, equals, _ = value.rpartition("=")
    return f"{name}={setting if equals else value}"


def merged(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """Our flags without those that the user's replace (see ``DEFAULTS``), then the user's."""
    replaced = {_setting(flag) for flag in theirs}
    return [flag for flag in ours if _setting(flag) not in replaced] + list(theirs)


def secrets(flags: Sequence[str]) -> tuple[str, ...]:
    """Values that must not be shown: those of settings with such a name, as the password of a Redis cache has."""
    return tuple(match["value"] for flag in flags if (match := _SECRET.search(flag)))


def shown(flag: str) -> str:
    """The flag with stars in place of a secret."""
    match = _SECRET.search(flag)
    return flag[: match.start("value")] + "***" if match else flag


#: What the toolkit gives and the user's own flag may replace. A stream may wait for minutes behind a busy engine, and
#: gRPC's defaults take that for a dead line: pings more often than every 300 s end the connection. Here one may come
#: every 10 s, with and without requests (half of that is allowed: a ping may be late, and the next one seems early),
#: and the server asks silent clients itself, so that lines through NATs and balancers stay and dead clients go.
DEFAULTS = {
    "grpc-http2-min-recv-ping-interval-without-data": "5000",
    "grpc-keepalive-permit-without-calls": "1",
    "grpc-keepalive-time": "30000",
    "grpc-keepalive-timeout": "20000",
    "grpc-http2-max-pings-without-data": "0",
}
