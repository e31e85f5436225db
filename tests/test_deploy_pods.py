"""The chart's CPU pods, run: the Job builds, servers and gateway start by their probes, are replaced under load, and
drain. Sources of what has to hold: Kubernetes' rules as ``pods`` plays them, and OpenAI's stream format."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

import chart
from conftest import SMALL_MODEL, minitron
from pods import Pod, Service

pytestmark = [pytest.mark.slow, pytest.mark.server]

STREAMS = 32


def can_mount() -> bool:
    done = subprocess.run(["unshare", "--mount", "--map-root-user", "true"], capture_output=True, check=False)
    return done.returncode == 0


class Cluster:
    """The chart's objects for the small Minitron, and what runs of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store, self.hosts = folder, folder / "store", folder / "hosts"
        self.store.mkdir()
        (self.objects,) = chart.render(self._values())
        self.triton = Service("demo-triton.llm.svc", self.hosts)
        self.gateway = Service("demo-gateway.llm.svc", folder / "gateway-hosts")
        self._count = 0

    def _values(self) -> dict[str, Any]:
        """What a user does on his own machine first: build, and render the values."""
        here = self.folder / "here"
        minitron("up", "--output", here, "--recipe", "cpu", "--model", SMALL_MODEL)
        minitron("render", here / "engine", "--output", here / "again", "--recipe", "cpu",
                 "--kubernetes", here / "values", "--replicas", "2")  # fmt: skip
        values = yaml.safe_load((here / "values" / "values.yaml").read_text())
        quick = {"triton": {"drainDelaySeconds": 5}, "gateway": {"drainDelaySeconds": 1, "maxStreams": 4096}}
        return chart.merged(values, quick | {"model": {"source": str(SMALL_MODEL)}})

    def build(self) -> subprocess.CompletedProcess[str]:
        """The Job's container."""
        job = chart.only(self.objects, "Job")["spec"]["template"]["spec"]
        recipe = self.folder / "recipe"
        recipe.mkdir(exist_ok=True)
        (recipe / "recipe.yaml").write_text(chart.only(self.objects, "ConfigMap", "-recipe")["data"]["recipe.yaml"])
        return Runner(job["containers"][0], {"/store": self.store, "/recipe": recipe, "/tmp": self.folder}).run()

    def start(self, kind: str) -> Pod:
        template = chart.only(self.objects, "Deployment", f"-{kind}")["spec"]["template"]
        service = self.triton if kind == "triton" else self.gateway
        self._count += 1
        folder = self.folder / f"{kind}-{self._count}"
        folder.mkdir()
        hosts = self.hosts if kind == "gateway" else None
        service.pods.append(Pod(template, folder, {"store": self.store}, service.publish, hosts))
        return service.pods[-1]

    def end(self) -> None:
        for pod in [*self.gateway.pods, *self.triton.pods]:
            pod.kill()


class Runner(Pod):
    """A container that runs to its end."""

    def __init__(self, container: dict[str, Any], mounts: dict[str, Path]) -> None:
        self._volumes = {one["name"]: mounts[one["mountPath"]] for one in container["volumeMounts"]}
        self._container, self._hosts, self.address = container, None, "127.0.0.1"

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._argv(self._container), env=self._environment(self._container), text=True,
                              capture_output=True, check=False, timeout=300)  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not can_mount():
        pytest.skip("this machine lets nobody mount a hosts file in a namespace (unshare --mount --map-root-user)")
    one = Cluster(tmp_path_factory.mktemp("cluster"))
    yield one
    one.end()


class Load:
    """Streams without a pause through whatever gateways the Service has, each to its end."""

    def __init__(self, cluster: Cluster, streams: int) -> None:
        self._cluster, self._streams = cluster, streams
        self.outcomes: Counter[str] = Counter()
        self.stopping = False

    async def run(self) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(self._one(session, number) for number in range(self._streams)))

    async def _one(self, session: aiohttp.ClientSession, number: int) -> None:
        turn = number
        while not self.stopping:
            pods = self._cluster.gateway.endpoints()
            self.outcomes[await self._ask(session, pods[turn % len(pods)].address)] += 1
            turn += 1

    async def _ask(self, session: aiohttp.ClientSession, address: str) -> str:
        body = {"model": "minitron", "prompt": "In the beginning", "max_tokens": 48, "stream": True, "ignore_eos": True,
                "stream_options": {"include_usage": True}}  # fmt: skip
        tokens, done = 0, False
        try:
            async with session.post(f"http://{address}:8080/v1/completions", json=body) as answer:
                if answer.status != 200:
                    return f"status {answer.status}: {(await answer.text())[:200]}"
                async for line in answer.content:
                    if line.startswith(b"data: [DONE]"):
                        done = True
                    elif line.startswith(b"data: "):
                        usage = json.loads(line[6:]).get("usage")
                        tokens = usage["completion_tokens"] if usage else tokens
        except aiohttp.ClientError as error:
            return f"{type(error).__name__}: {error}"
        return "whole" if done and tokens == 48 else f"cut off after {tokens} tokens"


def test_the_life_of_a_deployment(cluster: Cluster) -> None:
    """One story, because each step stands on the one before: build, start, roll both, scale down."""
    built = cluster.build()
    assert built.returncode == 0, built.stderr[-3000:]
    assert cluster.build().returncode == 0  # the Job once more: it finds the engine there

    first = [cluster.start("triton") for _ in range(2)]
    gateway = cluster.start("gateway")
    for pod in (*first, gateway):
        pod.wait_ready()
        assert pod.probed.index("startup ok") < pod.probed.index("readiness ok")

    asyncio.run(_roll(cluster, first, gateway))


async def _roll(cluster: Cluster, first: list[Pod], gateway: Pod) -> None:
    load = Load(cluster, STREAMS)
    running = asyncio.create_task(load.run())
    await asyncio.sleep(3)
    # maxSurge 1, maxUnavailable 0: a new one is ready before an old one is told to go.
    for old in first:
        new = await asyncio.to_thread(cluster.start, "triton")
        await asyncio.to_thread(new.wait_ready)
        assert await asyncio.to_thread(old.terminate) == 0, old.log[-3000:]
    new = await asyncio.to_thread(cluster.start, "gateway")
    await asyncio.to_thread(new.wait_ready)
    assert await asyncio.to_thread(gateway.terminate) == 0, gateway.log[-3000:]
    whole = load.outcomes["whole"]
    # Scale down from two servers to one.
    leaving = cluster.triton.endpoints()[0]
    assert await asyncio.to_thread(leaving.terminate) == 0, leaving.log[-3000:]
    await asyncio.sleep(2)
    load.stopping = True
    await running

    assert set(load.outcomes) == {"whole"}, load.outcomes
    assert load.outcomes["whole"] > whole > STREAMS
    for pod in (*first, gateway, leaving):
        assert pod.ended_after_s < pod.spec["terminationGracePeriodSeconds"]
    for pod in (*cluster.triton.pods, *cluster.gateway.pods):
        assert "restarted" not in pod.probed
    for pod in [*cluster.gateway.endpoints(), *cluster.triton.endpoints()]:
        assert await asyncio.to_thread(pod.terminate) == 0, pod.log[-3000:]


def test_what_cannot_load_ends_by_itself_and_is_never_started(cluster: Cluster) -> None:
    """Loading is a startup probe that fails while the process lives; broken is a process that has ended."""
    (weights,) = cluster.store.glob("*/repository/engine/openvino/openvino_model.xml")
    text = weights.read_text()
    weights.unlink()
    try:
        pod = cluster.start("triton")
        while len(pod.exits) < 2:  # started again, as the kubelet does, and ended again
            time.sleep(0.1)
        assert 0 not in pod.exits and "startup ok" not in pod.probed
        pod.kill()
    finally:
        weights.write_text(text)


def test_another_engine_than_the_key_says_is_not_served(cluster: Cluster) -> None:
    """The Job fails where what it builds is not what the values were rendered from."""
    (config,) = [
        one for one in cluster.objects if one["kind"] == "ConfigMap" and one["metadata"]["name"] == "demo-recipe"
    ]
    before, there = config["data"]["recipe.yaml"], cluster.store
    config["data"]["recipe.yaml"] = before.replace("concurrency: 4", "concurrency: 3")
    cluster.store = cluster.folder / "other"
    cluster.store.mkdir()
    try:
        done = cluster.build()
        assert done.returncode == 3 and "has another digest" in done.stderr
    finally:
        config["data"]["recipe.yaml"], cluster.store = before, there
