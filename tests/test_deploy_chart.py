"""The Helm chart: rendered and linted by Helm, valid by Kubernetes' own schemas, and in step with the toolkit."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import chart
from conftest import ROOT, minitron
from minitron import recipe
from minitron_triton.repository import kubernetes

#: The oldest that the chart takes, the oldest with OCI images as volumes, and the newest with schemas here.
VERSIONS = ("1.29", "1.33", "1.37")
#: Kinds that others bring to a cluster; their schemas are not Kubernetes' own.
FOREIGN = {"PodMonitor", "ServiceMonitor", "PrometheusRule", "ScaledObject", "ServingRuntime", "InferenceService"}
IMAGE = {
    "store": {"kind": "image", "image": {"reference": "registry.example/minitron-engine:1"}},
    "engine": {"path": "/models"},
}
COLLECTOR = "http://otel-collector.observability:4318"
TRACING = {"endpoint": COLLECTOR, "sampler": "parentbased_traceidratio", "samplerArg": "0.01", "rate": 100}
#: Further ways to use it, on top of a set.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "cpu-tls": ("cpu", chart.OF_THE_USER["tls-keys"]),
    "hpa": ("a100", {"autoscaling": {"kind": "hpa"}}),
    "kserve": ("a100", {"workload": "kserve", "autoscaling": {"kind": "hpa"}}),
    "kserve-cpu": ("cpu", {"workload": "kserve", "gateway": {"enabled": False}}),
    "oci-image": ("a100", IMAGE),
    "built-in-each-pod": ("cpu", {"store": {"kind": "init"}}),
    "traces": ("a100", {"tracing": TRACING}),
    "cpu-traces": ("cpu", {"tracing": TRACING}),
    "bare": ("cpu", {"networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}}),
}


@cache
def rendered() -> dict[str, list[dict[str, Any]]]:
    """All of them, in one start of Helm."""
    values = {name: chart.values_of(name) for name in chart.OF_THE_USER}
    values |= {name: chart.merged(chart.values_of(base), more) for name, (base, more) in MORE.items()}
    return dict(zip(values, chart.render(*values.values()), strict=True))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [*chart.OF_THE_USER, *MORE])
def test_objects_are_valid_for_kubernetes(name: str, version: str) -> None:
    """By the JSON schemas of Kubernetes' own OpenAPI description, strict: an unknown field is an error."""
    for found in rendered()[name]:
        if found["kind"] in FOREIGN:
            continue
        if name == "oci-image" and version == "1.29" and found["kind"] == "Deployment":
            continue  # volumes of OCI images came in 1.31
        kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("name", chart.OF_THE_USER)
def test_value_sets_are_what_render_derives(name: str) -> None:
    """``python tests/chart.py`` writes them."""
    assert chart.values_of(name) == chart.merged(chart.derived(name), chart.OF_THE_USER[name])


@pytest.mark.parametrize("name", [*chart.OF_THE_USER, *MORE])
def test_pods_are_restricted(name: str) -> None:
    """Kubernetes' Pod Security Standards, profile "restricted", and beyond it a root file system that is read-only."""
    for pod in pods(rendered()[name]):
        assert (
            pod["securityContext"]["runAsNonRoot"]
            and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        )
        assert pod["automountServiceAccountToken"] is False
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True
            names = {volume["name"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= names
            assert container["resources"]["limits"]["memory"]


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [one["spec"]["template"]["spec"] for one in objects if one["kind"] in ("Deployment", "Job")]
    for one in objects:
        if one["kind"] == "InferenceService":
            runtime = chart.only(objects, "ServingRuntime")
            found.append(one["spec"]["predictor"] | {"containers": runtime["spec"]["containers"]})
    return found


def servers(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Triton pod and its container."""
    pod = chart.only(rendered()[name], "Deployment", "-triton")["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


@pytest.mark.parametrize(
    ("name", "endpoint", "flags"), [("a100", "", ()), ("traces", COLLECTOR, ("--trace-rate=100",))]
)
def test_the_command_is_what_minitron_serve_runs_in_the_container(
    name: str, endpoint: str, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """'minitron serve --dry-run' with the same recipe says it, but for what differs with every start."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    import hand_made
    from minitron_triton.repository.options import from_recipe
    from minitron_triton.repository.render import render

    wanted = recipe.load("a100-int8", {}).recipe
    engine = hand_made.engine_folder(tmp_path / "engine", cpu=False, plugins={"use_paged_context_fmha": True})
    render(engine, tmp_path / "repository", from_recipe(wanted), root="/models")
    line = shlex.split(minitron("serve", tmp_path / "repository", "--dry-run", *flags).stdout)
    theirs = line[line.index("tritonserver") + 1 :]
    assert sorted(map(without_chance, run(servers(name)[1], tmp_path)[0])) == sorted(map(without_chance, theirs))


def test_traces_are_off_until_a_collector_is_named() -> None:
    """The variables are OpenTelemetry's; the servers of CPU engines read the same ones, and may reach the collector."""

    def environment(name: str, end: str) -> dict[str, str]:
        (container,) = chart.only(rendered()[name], "Deployment", end)["spec"]["template"]["spec"]["containers"]
        return {one["name"]: one["value"] for one in container["env"] if one["name"].startswith("OTEL_")}

    for name in chart.OF_THE_USER:
        assert "OTEL_" not in json.dumps(rendered()[name]) and "trace-config" not in json.dumps(rendered()[name])
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"}
    for name in ("traces", "cpu-traces"):
        assert environment(name, "-gateway") == {"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR} | sampler
        egress = chart.only(rendered()[name], "NetworkPolicy", "-triton")["spec"]["egress"]
        assert {"port": 4318, "protocol": "TCP"} in [port for rule in egress for port in rule["ports"]]
    assert environment("cpu-traces", "-triton") == {"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR}
    assert "--trace-rate=100" in servers("cpu-traces")[1]["args"]


@pytest.mark.parametrize("endpoint", ["collector:4318", "http://a b", "http://a/'; true '", "grpc://a:4317"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(AssertionError, match="tracing"):
        chart.render(chart.merged(chart.values_of("cpu"), {"tracing": {"endpoint": endpoint}}))


def without_chance(word: str) -> str:
    return re.sub(r"(server-key=|shm-region-prefix-name=).*", r"\1", word)


def run(container: dict[str, Any], folder: Path, **files: str) -> list[list[str]]:
    """The arguments that the container's own shell line gives to each tritonserver, which is a recorder here, as is
    mpirun; ``files`` stand where Secrets are mounted."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    for name in ("tritonserver", "mpirun"):
        program = folder / name
        program.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
        program.chmod(0o755)
    (script,) = container["args"]
    for path, text in files.items():
        (folder / path).write_text(text)
        script = script.replace(f"/secrets/api-key/{path}", str(folder / path))
    assert container["command"] == ["/bin/sh", "-ec"]
    done = subprocess.run(["/bin/sh", "-ec", script], capture_output=True, text=True, check=True,
                          env={"PATH": f"{folder}:/usr/bin:/bin"})  # fmt: skip
    words = done.stdout.splitlines()
    if Path(words[0]).name == "mpirun":
        words = [word for word in " ".join(words).replace(" : ", " ").split() if word not in ("-n", "1")]
    starts = [place for place, word in enumerate(words) if Path(word).name == "tritonserver"]
    return [words[start + 1 : end] for start, end in zip(starts, [*starts[1:], len(words)], strict=True)]


def test_two_gpus_are_two_ranks_under_mpirun(tmp_path: Path) -> None:
    """Leader mode of TensorRT-LLM's launch_triton_server.py (contract, 2.4): rank 1 loads the engine's model only."""
    _, container = servers("tp2")
    assert "exec mpirun --allow-run-as-root -n 1 tritonserver" in container["args"][0]
    first, second = run(container, tmp_path)
    assert "--load-model=tensorrt_llm_bls" in first
    assert [word for word in second if "load-model" in word] == ["--load-model=tensorrt_llm"]
    assert any("restricted" in word for word in first) and not any("restricted" in word for word in second)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert chart.only(rendered()["tp2"], "Deployment", "-triton")["spec"]["replicas"] == 1


def test_a_slice_of_mig_is_asked_for_by_its_name_and_on_its_board() -> None:
    """Names: NVIDIA's device plugin, MIG strategy "mixed"."""
    pod, container = servers("mig")
    assert container["resources"]["limits"]["nvidia.com/mig-3g.40gb"] == 1
    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"][0]["values"] == ["NVIDIA-A100-SXM4-80GB"]


def test_with_tls_http_is_asked_from_inside_and_nothing_secret_is_in_the_objects(tmp_path: Path) -> None:
    """As 'minitron serve' does: HTTP has no TLS in Triton, so it stays on the loopback address and behind a key."""
    pod, container = servers("tls-keys")
    (words,) = run(container, tmp_path, **{"api-key": "a-key-of-sixteen-characters\n"})
    assert {"--http-address=127.0.0.1", "--metrics-address=0.0.0.0", "--grpc-use-ssl-mutual=true"} <= set(words)
    assert any(word.endswith(":api-key=a-key-of-sixteen-characters") for word in words)
    (http,) = [word for word in words if word.startswith("--http-restricted-api")]
    assert "inference" in http and re.search(r":server-key=[0-9a-f]{36}$", http)
    assert "exec" in container["readinessProbe"] and "httpGet" not in container["livenessProbe"]
    assert all("secret" in volume for volume in pod["volumes"] if volume["name"] in ("tls", "api-key"))
    gateway = chart.only(rendered()["tls-keys"], "Deployment", "-gateway")["spec"]["template"]["spec"]["containers"][0]
    assert gateway["livenessProbe"]["httpGet"]["scheme"] == "HTTPS"
    assert not any("key" in item["name"].lower() and "value" in item and not item["value"].startswith("/")
                   for item in [*container["env"], *gateway["env"]])  # fmt: skip


def test_a_drain_fits_the_pod_s_grace() -> None:
    """SIGTERM comes after preStop, and SIGKILL when the grace is over, which counts from the beginning of preStop."""
    for name in chart.OF_THE_USER:
        for end, timeout in (("-triton", "exit-timeout"), ("-gateway", "drain-timeout")):
            pod = chart.only(rendered()[name], "Deployment", end)["spec"]["template"]["spec"]
            container = pod["containers"][0]
            delay = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
            words = container["args"][0] if len(container["args"]) == 1 else " ".join(container["args"])
            (limit,) = set(re.findall(rf"--{timeout}(?:-secs)?=(\d+)", words))
            assert pod["terminationGracePeriodSeconds"] >= delay + int(limit) + 10


def test_scaling_looks_at_what_waits_and_at_the_cache() -> None:
    """Not at Triton's own queue, which stays empty with this backend (contract triton-model-repository.md, 6)."""
    scaled = chart.only(rendered()["keda"], "ScaledObject")
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert all(any(name in query for name in recorded) for query in queries)
    assert [trigger["metricType"] for trigger in scaled["spec"]["triggers"]] == ["AverageValue", "Value"]
    metrics = chart.only(rendered()["hpa"], "HorizontalPodAutoscaler")["spec"]["metrics"]
    adapter = yaml.safe_load((chart.CHART / "files" / "prometheus-adapter.yaml").read_text(encoding="utf-8"))["rules"]
    assert metrics[0]["pods"]["metric"]["name"] == adapter["custom"][0]["name"]["as"]
    assert metrics[1]["external"]["metric"]["name"] == adapter["external"][0]["name"]["as"]
    assert "replicas" not in chart.only(rendered()["hpa"], "Deployment", "-triton")["spec"]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((chart.CHART / "files" / "rules.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_value_is_described_and_an_unknown_one_is_refused() -> None:
    schema = json.loads((chart.CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((chart.CHART / "values.yaml").read_text(encoding="utf-8"))

    def check(section: dict[str, Any], value: Any, place: str) -> None:
        assert section.get("description") or place == "", f"{place} has no description"
        if isinstance(value, dict) and "properties" in section:
            assert section["additionalProperties"] is False, place
            assert set(value) <= set(section["properties"]), place
            assert set(section["properties"]) - set(value) <= {"global"}, f"{place}: values.yaml lacks some"
            for key, inner in value.items():
                check(section["properties"][key], inner, f"{place}.{key}")

    check(schema, values, "")
    with pytest.raises(AssertionError, match="replica"):
        chart.render(chart.merged(chart.values_of("cpu"), {"triton": {"replica": 2}}))


def test_what_cannot_be_is_said_by_the_chart() -> None:
    with pytest.raises(AssertionError, match=r"store\.kind init builds in every pod"):
        chart.render(chart.merged(chart.values_of("a100"), {"store": {"kind": "init"}}))


def test_memory_follows_from_the_plan() -> None:
    """By hand, for int8 on one A100: 5,767,180,416 bytes of weights (docs/plan.md), 2 GiB each for Triton and the rank
    and 2 GiB of /dev/shm are 11.37 GiB, rounded up to quarters of a GiB."""
    _, container = servers("a100")
    assert container["resources"]["limits"]["memory"] == "11776Mi"
    assert container["resources"]["requests"]["memory"] == "11776Mi"
    pod, _ = servers("a100")
    (shm,) = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": str(2 << 30)}


def test_the_busy_fraction_is_below_what_a_full_batch_holds() -> None:
    """By hand: 32 sequences of 640 tokens of a cache of 0.12 x 77.57 GB / 131,072 B = 71,023 tokens are 0.288."""
    assert chart.values_of("a100")["autoscaling"]["kvCacheFraction"] == pytest.approx(0.8 * 0.288, abs=0.01)


def test_render_writes_values_for_the_chart(small_engine: Any, tmp_path: Path) -> None:
    """The command, with a real engine; Helm takes what it writes."""
    engine = small_engine("int8_weight_only")
    minitron("render", engine, "--output", tmp_path / "repository", "--recipe", "cpu",
             "--kubernetes", tmp_path / "deploy", "--replicas", "3")  # fmt: skip
    values = yaml.safe_load((tmp_path / "deploy" / "values.yaml").read_text(encoding="utf-8"))
    assert values["triton"]["replicas"] == 3 and values["autoscaling"]["minReplicas"] == 3
    manifest = json.loads((engine / "manifest.json").read_text(encoding="utf-8"))
    assert values["engine"]["key"] == manifest["details"]["cache"]["digest"]
    (objects,) = chart.render(values)
    assert chart.only(objects, "Deployment", "-triton")["spec"]["replicas"] == 3
    assert kubernetes.text(values).startswith("#")


def test_replicas_without_kubernetes_is_refused(tmp_path: Path) -> None:
    done = minitron("render", tmp_path, "--output", tmp_path / "r", "--replicas", "2", check=False)
    assert done.returncode == 2 and "--kubernetes" in done.stderr


def test_the_chart_has_the_toolkit_s_version() -> None:
    from minitron.version import VERSION

    found = yaml.safe_load((chart.CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert found["version"] == found["appVersion"] == VERSION
    assert (ROOT / "deploy").is_dir()
