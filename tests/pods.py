"""What a kubelet does with the chart's pods, as far as one machine goes: their own commands as processes, in the order
and with the probes, hooks and times that the manifests give.

A pod has an address of 127.0.0.0/8 of its own, so the ports are the manifest's. A volume is a folder, and its mount
paths are replaced in commands and environment; images, users and limits are not played. The names of Services are in a
hosts file, which a gateway sees as /etc/hosts in a mount namespace of its own: no double of the resolver.

Sources: Kubernetes' documentation, "Pod Lifecycle" (probes; termination: endpoints, preStop, SIGTERM, SIGKILL, all
within terminationGracePeriodSeconds).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from conftest import ROOMS, ROOT

_NET = 20 + os.getpid() % 200
_numbers = itertools.count(2)
_BACK_OFF_S = 1.0  # the kubelet's first one is ten seconds


class Pod:
    """One pod: its init containers run to their end, then its one container; probed until it is told to go."""

    def __init__(self, template: dict[str, Any], folder: Path, shared: dict[str, Path], changed: Callable[[], None],
                 hosts: Path | None = None) -> None:  # fmt: skip
        """``shared``: folders of volumes that are not the pod's own. ``changed`` is called when it is ready or not."""
        self.spec, self.address = template["spec"], f"127.{_NET}.0.{next(_numbers)}"
        self._folder, self._changed, self._hosts = folder, changed, hosts
        self._volumes = {one["name"]: shared.get(one["name"]) or self._own(one) for one in self.spec["volumes"]}
        self.started = self.ready = self.leaving = False
        self.probed: list[str] = []
        self.ended_after_s = 0.0
        for container in self.spec.get("initContainers", []):
            subprocess.run(self._argv(container), env=self._environment(container), check=True, timeout=300)
        (self._container,) = self.spec["containers"]
        self._log = (folder / "log").open("w")
        self.exits: list[int] = []
        self.process = self._start()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()

    def wait_ready(self, timeout_s: float = 400) -> Pod:
        until = time.monotonic() + timeout_s
        while not self.ready:
            assert time.monotonic() < until, self.log[-3000:]
            time.sleep(0.05)
        return self

    def terminate(self) -> int:
        """As the kubelet ends a pod; returns the exit code of its container. The grace counts from the beginning."""
        began = time.monotonic()
        self.leaving = True
        self._changed()
        hook = self._container["lifecycle"]["preStop"]["exec"]["command"]
        subprocess.run(hook, check=True, timeout=self.spec["terminationGracePeriodSeconds"])
        self.process.send_signal(signal.SIGTERM)
        left = self.spec["terminationGracePeriodSeconds"] - (time.monotonic() - began)
        try:
            code = self.process.wait(left)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.ended_after_s = time.monotonic() - began
        self._watching.join()
        return code

    def kill(self) -> None:
        """At the end of a test that failed, or of a pod that never came up."""
        self.leaving = True
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._argv(self._container), env=self._environment(self._container), stdout=self._log, stderr=self._log
        )

    def _own(self, volume: dict[str, Any]) -> Path:
        path = self._folder / str(volume["name"])
        path.mkdir(parents=True)
        return path

    def _argv(self, container: dict[str, Any]) -> list[str]:
        mounts = {one["mountPath"]: str(self._volumes[one["name"]]) for one in container["volumeMounts"]}
        mounts.pop("/dev/shm", None)  # this machine's own
        words = [translate(word, mounts, self.address) for word in (*container["command"], *container.get("args", []))]
        if words[0] == "minitron":
            words[:1] = [sys.executable, "-m", "minitron_cli"]
        if self._hosts:
            mount = f'mount --bind {self._hosts} /etc/hosts && exec "$0" "$@"'
            words = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, *words]
        return words

    def _environment(self, container: dict[str, Any]) -> dict[str, str]:
        mounts = {one["mountPath"]: str(self._volumes[one["name"]]) for one in container["volumeMounts"]}
        given = {one["name"]: translate(one["value"], mounts, self.address) for one in container["env"]} \
            if "env" in container else {}  # fmt: skip
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in ROOMS), "PATH": path} | given

    def _watch(self) -> None:
        """restartPolicy Always: a container that ends before its pod is to go is started again."""
        while True:
            self._watch_container()
            self.ready = self.started = False
            self._changed()
            code = self.process.wait()
            if self.leaving:
                return
            self.exits.append(code)
            time.sleep(_BACK_OFF_S)
            if self.leaving:
                return
            self.process = self._start()

    def _watch_container(self) -> None:
        """The probes: startup until it succeeds once, then readiness and liveness side by side."""
        startup, failures = self._container["startupProbe"], 0
        while self.process.poll() is None and not self._probe("startup", startup):
            failures += 1
            if failures >= startup["failureThreshold"]:
                self.process.kill()
                return
            time.sleep(startup["periodSeconds"])
        self.started = self.process.poll() is None
        kinds = {kind: self._container[f"{kind}Probe"] for kind in ("readiness", "liveness")}
        due, failed = dict.fromkeys(kinds, time.monotonic()), dict.fromkeys(kinds, 0)
        while self.process.poll() is None:
            for kind, probe in kinds.items():
                if time.monotonic() >= due[kind]:
                    due[kind] = time.monotonic() + probe["periodSeconds"]
                    failed[kind] = 0 if self._probe(kind, probe) else failed[kind] + 1
                    self._judge(kind, probe, failed[kind])
            time.sleep(0.05)

    def _judge(self, kind: str, probe: dict[str, Any], failures: int) -> None:
        if kind == "liveness":
            if failures >= probe["failureThreshold"]:
                self.probed.append("restarted")
                self.process.kill()
        elif not failures or failures >= probe["failureThreshold"]:
            was, self.ready = self.ready, not failures
            if was != self.ready:
                _yield_to_others(self.process.pid)
                self._changed()

    def _probe(self, kind: str, probe: dict[str, Any]) -> bool:
        get = probe["httpGet"]
        (port,) = [one["containerPort"] for one in self._container["ports"] if one["name"] == get["port"]]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{self.address}:{port}{get['path']}", timeout=probe["timeoutSeconds"]) as answer:
                good = 200 <= int(answer.status) < 400
        except (OSError, urllib.error.URLError):
            good = False
        self.probed.append(f"{kind} {'ok' if good else 'failed'}")
        return good


def _yield_to_others(pid: int) -> None:
    """Let a pod that is starting have its share of this one machine, as the CPU that it asks for is its own on a node.

    A process that works as much as it can takes all of two cores otherwise, and Triton gives up a model that shows no
    sign of life for some seconds while it loads (docs/serving.md).
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            for thread in process.threads():
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, thread.id, 15)


def translate(text: str, mounts: dict[str, str], address: str) -> str:
    """The text with folders in place of mount paths, and an address in place of 0.0.0.0.

    The checkout's own path stays, wherever it lies: it stands for a model outside the cluster.
    """
    here, text = "\0", text.replace(str(ROOT), "\0")
    paths = "|".join(re.escape(path) for path in sorted(mounts, key=len, reverse=True))
    text = re.sub(rf"(?<![\w/.])({paths})(?=[/\s'\"=]|$)", lambda found: mounts[found[1]], text) if paths else text
    return text.replace("0.0.0.0", address).replace(here, str(ROOT))


class Service:
    """The ready pods behind a name, in a hosts file."""

    def __init__(self, name: str, hosts: Path) -> None:
        self._name, self._hosts, self.pods = name, hosts, list[Pod]()
        self._lock = threading.Lock()
        self.publish()

    def endpoints(self) -> list[Pod]:
        return [pod for pod in self.pods if pod.ready and not pod.leaving]

    def publish(self) -> None:
        """Written in place: the file is mounted elsewhere."""
        with self._lock:
            lines = [f"{pod.address} {self._name}\n" for pod in self.endpoints()]
            self._hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
