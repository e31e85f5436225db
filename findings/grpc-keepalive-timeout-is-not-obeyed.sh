#!/bin/sh
# grpcio 1.85.3 (and 1.60.0, 1.66.2, 1.71.0, 1.78.0): the channel argument grpc.keepalive_timeout_ms does not say how long
# the answer to a keepalive ping may take.
#
# gRPC's keepalive guide (doc/keepalive.md of grpc/grpc) says that a connection whose ping is not acknowledged within this
# time is closed. A client that asks every second, and allows two seconds for the answer, waits more than a minute for a
# server that has stopped. What counts is grpc.http2.ping_timeout_ms, an argument that the guide does not have and whose
# default is 60 s: with it set to two seconds as well, the same client gives up in three.
#
# Seen:
#     keepalive_timeout_ms=2000: UNAVAILABLE, Stream removed (ping timeout), after 61 s
#     keepalive_timeout_ms=2000 and ping_timeout_ms=2000: UNAVAILABLE, Stream removed (ping timeout), after 3 s
set -eu
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" --disable-pip-version-check install --quiet grpcio==1.85.3
cd "$scratch"
cat > server.py <<'PYTHON'
import time
from concurrent.futures import ThreadPoolExecutor

import grpc


class Slow(grpc.GenericRpcHandler):
    """Answers any call after a while."""

    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: time.sleep(300))


server = grpc.server(ThreadPoolExecutor(4))
server.add_generic_rpc_handlers((Slow(),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
server.wait_for_termination()
PYTHON
cat > try.py <<'PYTHON'
import os
import signal
import subprocess
import sys
import threading
import time

import grpc

ASKED = [("grpc.keepalive_time_ms", 1000), ("grpc.http2.max_pings_without_data", 0), ("grpc.enable_http_proxy", 0)]
TOLD = [("grpc.keepalive_timeout_ms", 2000)]
server = subprocess.Popen([sys.executable, "server.py"], stdout=subprocess.PIPE, text=True)
address = f"127.0.0.1:{int(server.stdout.readline())}"
took = {}


def wait(name, options):
    with grpc.insecure_channel(address, [*options, ("grpc.use_local_subchannel_pool", 1)]) as channel:
        grpc.channel_ready_future(channel).result(30)
        call = channel.unary_unary("/any/call").future(b"", timeout=200)
        ready.wait()
        stopped = time.monotonic()
        error = call.exception()
        took[name] = time.monotonic() - stopped
        print(f"{name}: {error.code().name}, {error.details()}, after {took[name]:.0f} s", flush=True)


ready = threading.Barrier(3)
cases = {"keepalive_timeout_ms=2000": ASKED + TOLD,
         "keepalive_timeout_ms=2000 and ping_timeout_ms=2000": [*ASKED, *TOLD, ("grpc.http2.ping_timeout_ms", 2000)]}
threads = [threading.Thread(target=wait, args=case) for case in cases.items()]
for thread in threads:
    thread.start()
ready.wait()
os.kill(server.pid, signal.SIGSTOP)
for thread in threads:
    thread.join()
server.kill()
first, second = (took[name] for name in cases)
sys.exit(not (first > 40 and second < 20))
PYTHON
"$scratch/venv/bin/python" try.py
