"""A stand-in for ``docker run`` and ``docker kill`` where a server runs in the container.

Like docker, it refuses flags and images that it does not know, keeps the container apart from the client (a client that
is killed leaves it running), hands SIGTERM and SIGINT on to the container's first process and exits with its code. That
process answers Triton's health, generate_stream, logging and unload on the ports that are published, says in Triton's
words that the instances of an unloaded model end, and ends with 0 on SIGTERM.

DOCKER_DOUBLE names a folder: ``calls`` gets every command line as JSON, ``NAME.pid`` the process of a container. With
DOCKER_DOUBLE_UNLOADS=no logging and unload are unknown to it.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["DOCKER_DOUBLE"])


def main() -> int:
    with open(FOLDER / "calls", "a", encoding="utf-8") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    what, *words = sys.argv[1:]
    if what == "run":
        return run(words)
    if what == "kill":
        return kill(*words)
    if what == "inside":
        return inside(int(words[0]))
    print(f"docker: '{what}' is not a docker command.", file=sys.stderr)
    return 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="docker run", allow_abbrev=False)
    made.add_argument("--rm", action="store_true")
    for single in ("--name", "--gpus", "--shm-size", "--user", "--stop-timeout"):
        made.add_argument(single, required=True)
    for several in ("--ulimit", "--env", "--volume", "--publish"):
        made.add_argument(several, action="append", default=[])
    made.add_argument("image")
    made.add_argument("command", nargs=argparse.REMAINDER)
    return made


def run(words: list[str]) -> int:
    args = parser().parse_args(words)
    if not re.fullmatch(r"[\w.]+/[\w./-]+:[\w.-]+", args.image):
        print(f"docker: invalid reference format: {args.image}", file=sys.stderr)
        return 125
    for volume in args.volume:
        if not Path(volume.split(":")[0]).exists():
            print(f"docker: {volume}: no such file or directory", file=sys.stderr)
            return 125
    published = {inside: outside for _, outside, inside in (port.split(":") for port in args.publish)}
    http_inside = next(word.partition("=")[2] for word in args.command if word.startswith("--http-port="))
    container = subprocess.Popen(
        [sys.executable, __file__, "inside", published[http_inside]], start_new_session=True,
        env={name: value for name, value in os.environ.items() if name == "PATH" or name.startswith("DOCKER_DOUBLE")},
    )  # fmt: skip
    (FOLDER / f"{args.name}.pid").write_text(str(container.pid))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: container.send_signal(number))
    code = container.wait()
    (FOLDER / f"{args.name}.pid").unlink(missing_ok=True)
    return code if code >= 0 else 128 - code


def kill(name: str) -> int:
    try:
        os.kill(int((FOLDER / f"{name}.pid").read_text()), signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        print(f"Error response from daemon: No such container: {name}", file=sys.stderr)
        return 1
    return 0


def inside(port: int) -> int:
    """The container's first process."""

    class Triton(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if re.fullmatch(r"/v2/(health|models/\w+)/ready", self.path) else 404)
            self.end_headers()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            unloaded = re.fullmatch(r"/v2/repository/models/(\w+)/unload", self.path)
            if (unloaded or self.path == "/v2/logging") and os.environ.get("DOCKER_DOUBLE_UNLOADS") != "no":
                if unloaded:
                    where = "I 1 backend_model_instance.cc:825]"
                    said = f'2026-01-31T09:37:44Z {where} "Stopping backend thread for {unloaded[1]}_0_0..."'
                    print(said, file=sys.stderr, flush=True)
                self.send_response(200)
                self.end_headers()
                return
            self.send_response(200 if re.fullmatch(r"/v2/models/\w+/generate_stream", self.path) else 404)
            self.end_headers()
            self.wfile.write(b'data: {"text_output":"warm"}\n\n')

    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    http.server.HTTPServer(("127.0.0.1", port), Triton).serve_forever()
    return 1


if __name__ == "__main__":
    sys.exit(main())
