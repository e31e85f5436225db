"""The command line of ``tritonserver`` for a repository of ours; the same for the bundled server and the container.

Names of flags: ``tritonserver --help`` of 2.51.0. Model control is explicit because tokenizer/ and engine/ lie beside
the models.
"""

from __future__ import annotations

from collections.abc import Sequence

from minitron.text.channel import API_KEY
from minitron_triton.server import triton_flags
from minitron_triton.server.launch import Options, Ports, Served

#: Interfaces that can make the server run other code or write files: no client of ours needs them.
ADMIN = ("model-repository", "trace", "logging")
USER = ("inference", "metadata", "model-config", "shared-memory", "statistics")


def flags(
    served: Served,
    options: Options,
    *,
    repository: str,
    ports: Ports,
    mark: str,
    bind_http: str,
    bind_metrics: str | None = None,
    rank: int = 0,
    more: Sequence[str] = (),
) -> list[str]:
    """Everything behind the word ``tritonserver``.

    ``repository`` is the folder, ``options.host``, ``bind_http`` and ``bind_metrics`` (None: as HTTP) the
    addresses, as the server sees them. Ranks above
    0 of a parallel engine load only ``tensorrt_llm``; they get the same ports, and do not open them. ``more``: what
    this way to run the server needs besides. The user's own flags (``options.triton_flags``) come last.
    """
    models = served.models if rank == 0 else ("tensorrt_llm",)
    words = [
        f"--model-repository={repository}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models),
    ]
    if served.backend != "llmapi":  # there, model.py itself completes the config
        words.append("--disable-auto-complete-config")
    words += [
        f"--grpc-address={options.host}",
        f"--grpc-port={ports.grpc}",
        f"--http-address={bind_http}",
        f"--http-port={ports.http}",
        f"--metrics-address={bind_metrics or bind_http}",
        f"--metrics-port={ports.metrics}",
        f"--exit-timeout-secs={options.exit_timeout_s}",
        f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix(mark, rank)}",
        "--log-format=ISO8601",
        f"--log-verbose={int(options.verbose)}",
        *(f"--{name}={value}" for name, value in triton_flags.DEFAULTS.items()),
        *more,
    ]
    words += options.traces.flags if options.traces else []
    return triton_flags.merged([*words, *_tls(options), *_restrictions(options)], options.triton_flags)


def shared_memory_prefix(mark: str, rank: int | None = None) -> str:
    """Names of the server's segments in /dev/shm start with this; without a rank, those of all ranks."""
    return f"minitron-{mark}-" + ("" if rank is None else f"{rank}-")


def _tls(options: Options) -> list[str]:
    if options.tls is None:
        return []
    words = [
        "--grpc-use-ssl=true",
        f"--grpc-server-cert={options.tls.certificate}",
        f"--grpc-server-key={options.tls.key}",
    ]
    if options.tls.ca:
        words += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={options.tls.ca}"]
    return words


def _restrictions(options: Options) -> list[str]:
    """Which interfaces demand which key; health is always open. Without a server key none does.

    HTTP has no TLS: where TLS was asked for, it answers health alone, or it would be a way round.
    """
    if not options.server_key:
        return []
    grpc: list[tuple[tuple[str, ...], str, str]] = [(ADMIN, "server-key", options.server_key)]
    if options.api_key:
        grpc.append((USER, API_KEY, options.api_key))
    http = [(ADMIN + USER, "server-key", options.server_key)] if options.tls else grpc
    return [
        *(f"--grpc-restricted-protocol={','.join(names)}:{header}={key}" for names, header, key in grpc),
        *(f"--http-restricted-api={','.join(names)}:{header}={key}" for names, header, key in http),
    ]
