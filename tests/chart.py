"""The Helm chart, rendered and linted by Helm itself in a process of its own, and the value sets that it is tried with.

Helm's SDK is a Go library: it brings a runtime with threads and signal handlers, which do not belong into a process
that starts servers. So this file is also a program: values by name go in, manifests come out, as JSON.

``python tests/chart.py`` writes the value sets in ``deploy/helm/minitron/ci`` anew.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
CHART = ROOT / "deploy" / "helm" / "minitron"
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / part) for part in ("tests", "core", "build", "model_repo", "clients", "models")]

#: What a user adds to the derived values, by set.
OF_THE_USER: dict[str, dict[str, Any]] = {
    "cpu": {"monitoring": {"enabled": True, "dashboard": True}},
    "a100": {},
    "tp2": {},
    "mig": {},
    "tls-keys": {
        "security": {
            "tritonTls": {"secret": "triton-tls", "mutual": True},
            "gatewayTls": {"secret": "gateway-tls"},
            "tritonApiKey": {"secret": "triton-key"},
            "gatewayApiKeys": {"secret": "client-keys"},
        },
        "model": {"tokenSecret": "huggingface"},
        "monitoring": {"enabled": True},
    },
    "keda": {"autoscaling": {"kind": "keda"}, "monitoring": {"enabled": True, "dashboard": True}},
}
#: Recipe and what is changed in it, by set.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "cpu": ("cpu", {}),
    "a100": ("a100-int8", {}),
    "tp2": ("a100-bfloat16", {"tensor_parallel": 2, "workload.concurrency": 64}),
    "mig": ("a100-int8", {"target": "a100-80gb-3g.40gb"}),
    "tls-keys": ("a100-int8", {}),
    "keda": ("a100-int8", {}),
}


def derived(name: str) -> dict[str, Any]:
    """The values of a set as ``minitron render --kubernetes`` derives them, of an engine made by hand."""
    import hand_made
    from minitron import recipe
    from minitron_build.plan import engine_plan, model
    from minitron_triton.repository import kubernetes
    from minitron_triton.repository.options import from_recipe
    from minitron_triton.repository.render import render
    from minitron_triton.server.launch import Served

    shipped, changed = RECIPES[name]
    wanted = recipe.load(shipped, {}, changed).recipe
    plan = engine_plan.plan(wanted, model.look_up(wanted.model)).document()
    with tempfile.TemporaryDirectory() as folder:
        cpu, output = wanted.target == "cpu", Path(folder, "repository")
        engine = hand_made.engine_folder(Path(folder, "engine"), cpu=cpu, tp=wanted.tensor_parallel,
                                         plugins={"use_paged_context_fmha": True})  # fmt: skip
        render(engine, output, from_recipe(wanted), root=None if cpu else "/models")
        served = Served.read(output)
    return kubernetes.values(wanted, plan, served, key=hashlib.sha256(name.encode()).hexdigest())


def values_of(name: str) -> dict[str, Any]:
    """The committed values of a set."""
    found = yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """As Helm merges value files: mappings key by key, anything else whole."""
    both = dict(below)
    for key, value in above.items():
        known = both.get(key)
        both[key] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return both


def render(*sets: dict[str, Any], release: str = "demo", namespace: str = "llm") -> list[list[dict[str, Any]]]:
    """The objects that the chart makes of each of the values, linted before; raises AssertionError."""
    asked = json.dumps({"sets": sets, "release": release, "namespace": namespace})
    done = subprocess.run(
        [sys.executable, __file__, "render"], input=asked, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        [found for text in files.values() for found in yaml.safe_load_all(text) if found]
        for files in json.loads(done.stdout)
    ]


def only(objects: list[dict[str, Any]], kind: str, end: str = "") -> dict[str, Any]:
    """The one object of a kind whose name has this end."""
    (found,) = [one for one in objects if one["kind"] == kind and one["metadata"]["name"].endswith(end)]
    return found


def _render() -> None:
    import helm_python as helm

    asked = json.load(sys.stdin)
    chart, found = helm.Chart.load(CHART), []
    for values in asked["sets"]:
        report = helm.lint(CHART, values, strict=True, namespace=asked["namespace"])
        wrong = [message for message in report["messages"] if message["severity"] > 1] + report["errors"]
        if wrong:
            raise SystemExit(f"helm lint: {wrong}")
        made = chart.render(values, name=asked["release"], namespace=asked["namespace"])
        found.append({name: text for name, text in made.items() if name.endswith(".yaml")})
    json.dump(found, sys.stdout)


def _write() -> None:
    from minitron_triton.repository import kubernetes

    for name, own in OF_THE_USER.items():
        text = kubernetes.text(merged(derived(name), own))
        (CHART / "ci" / f"{name}-values.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    _render() if sys.argv[1:] == ["render"] else _write()
