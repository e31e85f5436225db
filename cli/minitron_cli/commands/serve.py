"""``minitron serve DIR``: Triton on a model repository, supervised to the end."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from minitron import console, recipe
from minitron.arguments import Parser
from minitron.errors import UsageError
from minitron.recipe_model import Recipe
from minitron.text import packages
from minitron_triton.repository.options import IMAGE
from minitron_triton.server import bundled, container, detach, launch, state, tls, triton_flags
from minitron_triton.server.launch import Launch, Options, Ports, Served
from minitron_triton.server.leftovers import Process
from minitron_triton.server.openai import OpenAi
from minitron_triton.server.ports import Reservation
from minitron_triton.server.state import State
from minitron_triton.server.supervisor import Supervisor, stop_signals_held
from minitron_triton.server.traces import Traces

log = logging.getLogger(__name__)

_KEY_FILE = "api-key"


def configure(parser: Parser) -> None:
    """Declare the arguments."""
    parser.rest = "triton_flags"
    parser.epilog = "What stands behind '--' are flags of tritonserver itself: minitron serve DIR -- --id=one"
    add = parser.add_argument
    add("repository", type=Path, metavar="DIR", help="a model repository made by 'minitron render'")
    recipe.add_flags(parser, "serving.grpc_port", "serving.http_port", "serving.metrics_port", "serving.exit_timeout_s",
                     "container.image")  # fmt: skip
    add("--host", default=Options.host, metavar="ADDRESS", help="address to listen on (default %(default)s)")
    add("--metrics-host", metavar="ADDRESS",
        help="address of the metrics (default: as HTTP, which with TLS is this machine alone)")  # fmt: skip
    add("--tls-cert", type=Path, metavar="PEM", help="server certificate: gRPC speaks TLS, HTTP answers health only")
    add("--tls-key", type=Path, metavar="PEM", help="the certificate's private key")
    add("--tls-ca", type=Path, metavar="PEM", help="demand client certificates signed by this one (mutual TLS)")
    add("--loopback-cert", type=Path, metavar="PEM",
        help="with --tls-ca: what the text model shows to its own server (default: its certificate)")  # fmt: skip
    add("--loopback-key", type=Path, metavar="PEM", help="its private key")
    add("--api-key-file", type=Path, metavar="FILE", help="demand the key in this file with every request but health")
    add("--ready-timeout", type=int, default=Options.ready_timeout_s, metavar="SECONDS",
        help="how long loading may take (default %(default)s)")  # fmt: skip
    add("--restarts", type=int, default=Options.restarts, metavar="N",
        help="start a crashed server again, at most N times in 10 minutes (default %(default)s)")  # fmt: skip
    add("--openai", type=int, metavar="PORT",
        help="offer OpenAI's HTTP API on this port beside the server ('minitron gateway'), 0: a free one")  # fmt: skip
    add("--detach", action="store_true", help="return when the server is ready; 'minitron stop' ends it")
    add("--dry-run", action="store_true", help="print the command line and start nothing")
    add("--dockerfile", action="store_true",
        help="print two lines that derive an image with every package that the models need; start nothing")  # fmt: skip
    add("--state", type=Path, metavar="FOLDER", help="where to keep what 'minitron status' and 'stop' read")
    add(
        "--server",
        choices=("bundled", "container"),
        help="Triton of the nvidia-pytriton wheel, or NVIDIA's image under docker (default: what the engine needs)",
    )
    add("--gpus", default=Options.gpus, metavar="WHICH", help="what 'docker run --gpus' takes (default %(default)s)")
    add("--trace-rate", type=int, default=0, metavar="N",
        help="where OTEL_EXPORTER_OTLP_ENDPOINT names a collector: trace also every Nth request that comes without a "
        "trace, 0: none of them (default %(default)s)")  # fmt: skip
    add("--verbose", action="store_true", help="let Triton log every request")
    add("--json", action="store_true", help="when ready, print the server's state as JSON")


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; returns the server's exit code."""
    served = Served.read(args.repository)
    if args.dockerfile:
        return _print_dockerfile(served)
    wanted_by_recipe = recipe.from_args(args).recipe
    serving = wanted_by_recipe.serving
    parent = Path(os.path.abspath(args.state or state.home()))
    mark = launch.new_mark()
    folder = parent / mark
    options = _options(args, wanted_by_recipe, folder)
    wanted = Ports(serving.grpc_port, serving.http_port, serving.metrics_port)
    contained = args.server == "container" or (args.server is None and served.backend != "python")
    if args.image and not contained:
        raise UsageError(f"--image {args.image} is of a container, and {served.folder} is served without one")
    served = replace(served, image=wanted_by_recipe.container.image or served.image)
    make = container.launch if contained else bundled.launch
    if args.dry_run:
        print(_shell_line(make(served, options, wanted, folder, mark), options, args.api_key_file))
        return 0
    check = container.check_machine if contained else partial(bundled.check_machine, gateway=args.openai is not None)
    check(served)
    _warn_of_secrets(options)
    for old in state.servers(parent, served.folder):
        if old.ended:
            old.clear()
    with Reservation(options, wanted) as reserved, stop_signals_held():
        launched = make(served, options, reserved.ports, folder, mark)
        starting = _state(folder, served, options, reserved.ports, launched)
        openai = None
        if args.openai is not None:
            openai = OpenAi(served, options, reserved.ports, args.openai, starting.log)
        starting.create()
        try:
            if options.api_key and options.api_key_file == folder / _KEY_FILE:
                _write_key(options.api_key_file, options.api_key)
            if contained:
                reserved.release()  # Docker listens without SO_REUSEADDR
            else:
                bundled.prepare(folder)
                bundled.link(served, folder, mark)
            let_go = None
            if args.detach:
                let_go = detach.fork()
                starting = starting.enter("starting", supervisor=_me())
        except BaseException:
            starting.clear()
            raise

        def on_ready(ready: State) -> None:
            _announce(ready, options, as_json=args.json)
            if let_go:
                let_go(ready.log)

        return Supervisor(launched, served, options, starting, openai).run(on_ready)


def _warn_of_secrets(options: Options) -> None:
    if options.api_key:
        log.warning("Triton takes the API key on its command line, where every user of this machine can read it")
    if triton_flags.secrets(options.triton_flags):
        log.warning("a flag behind '--' holds a secret, and every user of this machine can read it there")


def _print_dockerfile(served: Served) -> int:
    if served.backend != "tensorrtllm":
        raise UsageError(
            f"{served.folder} has no TensorRT engine, and only models around one may need more than NVIDIA's image has"
        )
    print(packages.dockerfile(served.image or IMAGE), end="")
    return 0


def _shell_line(launched: Launch, options: Options, key_file: Path | None) -> str:
    """The command line for a shell; the API key stays in its file, and stars stand for the user's own secrets."""
    words = []
    for word in launched.argv:
        if options.api_key and options.api_key in word:
            words.append('"' + word.replace(options.api_key, f"$(cat {shlex.quote(str(key_file))})") + '"')
        else:
            words.append(shlex.quote(triton_flags.shown(word) if word in options.triton_flags else word))
    return " ".join(words)


def _options(args: argparse.Namespace, wanted: Recipe, folder: Path) -> Options:
    if args.restarts < 0:
        raise UsageError(f"--restarts {args.restarts} is less than none; 0 leaves a crashed server down")
    return Options(
        host=launch.check_host(args.host),
        metrics_host=launch.check_host(args.metrics_host, "--metrics-host") if args.metrics_host else None,
        tls=tls.read(args.tls_cert, args.tls_key, args.tls_ca, (args.loopback_cert, args.loopback_key)),
        api_key=launch.read_api_key(args.api_key_file),
        api_key_file=_key_file(args.api_key_file, folder),
        exit_timeout_s=wanted.serving.exit_timeout_s,
        ready_timeout_s=args.ready_timeout,
        restarts=args.restarts,
        gpus=args.gpus,
        environment=wanted.container.environment,
        verbose=args.verbose,
        traces=Traces.of(args.trace_rate),
        triton_flags=triton_flags.read(args.triton_flags),
    )


def _key_file(given: Path | None, folder: Path) -> Path | None:
    """Where the models read the API key: the user's own file, or, where that was a pipe, one in the server's folder."""
    if given is None:
        return None
    return given.resolve() if given.is_file() else folder / _KEY_FILE


def _write_key(path: Path, key: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(key + "\n")


def _me() -> Process:
    me = Process.of(os.getpid())
    assert me is not None
    return me


def _state(folder: Path, served: Served, options: Options, ports: Ports, launched: Launch) -> State:
    urls = {
        "grpc": f"{options.host}:{ports.grpc}",
        "http": f"{options.http_host}:{ports.http}",
        "metrics": f"{options.metrics_bind}:{ports.metrics}",
    }
    timeout_s = options.exit_timeout_s
    return State(
        folder, launched.mark, served.folder, served.front, _me(), "starting", urls, timeout_s, launched.container
    )


def _announce(ready: State, options: Options, *, as_json: bool) -> None:
    urls = ready.urls
    log.info(
        "ready: %s answers on gRPC %s and on %s, metrics on %s/metrics; 'minitron stop' or Ctrl-C ends it",
        ready.front, urls["grpc"], _url("http", urls["http"]), _url("http", urls["metrics"]),
    )  # fmt: skip
    if "openai" in urls:
        log.info("OpenAI's API: %s/v1", _url("https" if options.tls else "http", urls["openai"]))
    if as_json:
        console.emit_json(ready.document())
        sys.stdout.flush()


def _url(scheme: str, address: str) -> str:
    """What finds HOST:PORT from this machine, to be pasted."""
    host, _, port = address.rpartition(":")
    return f"{scheme}://{launch.reachable(host)}:{port}"
