"""A server, a gateway and a real Prometheus that scrapes both by the chart's rules, and a load on them.

``python tests/monitored.py`` records ``data/monitoring/step_load.json`` anew: 23 minutes of one server, as Prometheus
stored them. The tests of the alerts and of the scaling read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / part) for part in ("tests", "core", "build", "model_repo", "clients", "models")]

import aiohttp  # noqa: E402

from bare_process import unused_port  # noqa: E402
from chart import CHART  # noqa: E402
from gateway_process import Gateway  # noqa: E402
from serving import server  # noqa: E402

RECORDED = ROOT / "tests" / "data" / "monitoring" / "step_load.json"
RULES = CHART / "files" / "rules.yaml"
#: What is recorded: what the rules and the scaling read.
_SERIES = (
    "nv_trt_llm_request_metrics", "nv_trt_llm_kv_cache_block_metrics", "nv_trt_llm_general_metrics",
    "minitron_gateway_upstream_ready", "minitron_gateway_requests_total", "minitron_gateway_streams",
    "minitron_gateway_generated_tokens_total", "minitron_gateway_broken_streams_total",
    "minitron_gateway_time_to_first_token_seconds_bucket", "minitron_gateway_inter_token_latency_seconds_bucket",
)  # fmt: skip
_STEP_S = 10


@dataclass(frozen=True)
class Phase:
    """A part of the step load: so many streams at a time; ``dead``: the server has been stopped."""

    name: str
    seconds: int
    streams: int
    dead: bool = False


STEPS = (
    Phase("light", 60, 2), Phase("heavy", 660, 32), Phase("light again", 120, 2), Phase("idle", 120, 0),
    Phase("dead", 420, 2, dead=True),
)  # fmt: skip


class Prometheus:
    """Debian's prometheus on a folder of its own."""

    def __init__(self, folder: Path, targets: dict[str, str], scrape_s: int) -> None:
        """``targets``: job to host:port; the job is the instance too."""
        self._url = f"127.0.0.1:{unused_port()}"
        configs = [
            {"job_name": job, "static_configs": [{"targets": [target], "labels": {"instance": f"{job}-0"}}]}
            for job, target in targets.items()
        ]
        config = {
            "global": {"scrape_interval": f"{scrape_s}s", "evaluation_interval": f"{scrape_s}s"},
            "rule_files": [str(RULES)], "scrape_configs": configs,
        }  # fmt: skip
        (folder / "prometheus.yml").write_text(json.dumps(config))  # YAML's subset
        self.process = subprocess.Popen(
            ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
             f"--web.listen-address={self._url}", "--log.level=warn"],
            stdout=(folder / "prometheus.log").open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ask(self, path: str, **parameters: str | float) -> Any:
        url = f"http://{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as answer:
            return json.loads(answer.read())["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def wait_for(self, expression: str, timeout_s: float = 60) -> list[dict[str, Any]]:
        until = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError):
                if found := self.query(expression):
                    return found
            assert time.monotonic() < until, f"Prometheus never answered {expression}"
            time.sleep(0.5)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@dataclass(frozen=True)
class Monitored:
    """What runs."""

    gateway: Gateway
    prometheus: Prometheus
    server: Any


@contextlib.contextmanager
def monitored(repository: Path, folder: Path, *, scrape_s: int, max_streams: int) -> Iterator[Monitored]:
    """A server, its gateway and their Prometheus."""
    with server(repository) as serving:
        gateway = Gateway("--upstream", serving["urls"]["grpc"], "--max-streams", str(max_streams), "--repository",
                          repository, log=folder / "gateway.log")  # fmt: skip
        targets = {"triton": serving["urls"]["metrics"], "gateway": gateway.address}
        prometheus = Prometheus(folder, targets, scrape_s)
        try:
            yield Monitored(gateway, prometheus, serving)
        finally:
            prometheus.end()
            gateway.end()


async def load(address: str, streams: int, seconds: float, max_tokens: int = 200) -> None:
    """So many streams at a time, whatever becomes of them."""
    until = time.monotonic() + seconds

    async def one(session: aiohttp.ClientSession) -> None:
        body = {"model": "minitron", "prompt": "In the beginning", "max_tokens": max_tokens, "stream": True,
                "ignore_eos": True}  # fmt: skip
        while time.monotonic() < until:
            async with session.post(f"http://{address}/v1/completions", json=body) as answer:
                await answer.read()
                if answer.status != 200:
                    await asyncio.sleep(1)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session) for _ in range(streams)))
    await asyncio.sleep(max(0.0, until - time.monotonic()))


def _record(repository: Path) -> None:
    folder, phases = Path(tempfile.mkdtemp()), []
    with monitored(repository, folder, scrape_s=_STEP_S, max_streams=24) as running:
        running.prometheus.wait_for("minitron_gateway_upstream_ready == 1")
        began = time.time()
        for phase in STEPS:
            if phase.dead:
                running.server["process"].terminate()
            phases.append({"name": phase.name, "at_s": round(time.time() - began), "streams": phase.streams})
            print(phases[-1], flush=True)
            asyncio.run(load(running.gateway.address, phase.streams, phase.seconds))
        ended = time.time()
        series = []
        for name in _SERIES:
            data = running.prometheus.ask("query_range", query=name, start=began, end=ended, step=_STEP_S)
            for one in data["result"]:
                at = {round((when - began) / _STEP_S): value for when, value in one["values"]}
                values = [at.get(step) for step in range(round((ended - began) / _STEP_S))]
                series.append({"labels": one["metric"], "values": values})
    document = {"step_s": _STEP_S, "phases": phases, "series": series}
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(document, separators=(",", ":")).replace('},{"labels"', '},\n{"labels"') + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    _record(Path(sys.argv[1]))
