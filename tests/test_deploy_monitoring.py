"""The board, the alerts and the recorded rules: by Prometheus' own programs, on a server under a real load.

``promtool`` and ``prometheus`` are Debian's (package prometheus); without them these tests are skipped, and .ci/run
brings them.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import chart
from conftest import ROOT
from monitored import RECORDED, RULES, Monitored, load, monitored

RUNBOOKS = ROOT / "docs" / "runbooks"
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool: apt-get install prometheus")
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus: apt-get install prometheus")


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", alerts())
def test_every_alert_has_a_runbook_page(name: str) -> None:
    """Each: what it means, what to look at, what to do."""
    assert alerts()[name]["annotations"]["runbook_url"] == f"RUNBOOKS/{name}.md"
    text = (RUNBOOKS / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## What it means", "## What to look at", "## What to do",
    ]  # fmt: skip


def test_the_chart_puts_the_runbooks_place_in() -> None:
    values = chart.merged(chart.values_of("cpu"), {"monitoring": {"runbooks": "https://wiki.example/minitron"}})
    (objects,) = chart.render(values)
    rules = json.dumps(chart.only(objects, "PrometheusRule"))
    assert "https://wiki.example/minitron/MinitronNoTokens.md" in rules and "RUNBOOKS" not in rules
    board = json.loads(chart.only(objects, "ConfigMap", "-dashboard")["data"]["minitron.json"])
    assert board["uid"] == "minitron"


def recorded() -> dict[str, Any]:
    document = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def phase_minute(name: str) -> float:
    (at,) = [one["at_s"] for one in recorded()["phases"] if one["name"] == name]
    return float(at) / 60


def series_of(labels: dict[str, str], values: list[str | None]) -> dict[str, str]:
    """A series as promtool's input: "_" where there was no sample."""
    name = labels["__name__"]
    rest = ",".join(f'{key}="{value}"' for key, value in labels.items() if key != "__name__")
    return {"series": f"{name}{{{rest}}}", "values": " ".join("_" if one is None else one for one in values)}


def firing(tmp_path: Path, at_minutes: list[float], series: list[dict[str, str]]) -> dict[float, set[str]]:
    """Which alerts fire at which minute, asked of promtool: it is told that none does, and says which do."""
    tests = [
        {"eval_time": f"{round(60 * minute)}s", "alertname": name, "exp_alerts": []}
        for minute in at_minutes
        for name in alerts()
    ]
    document = {
        "rule_files": [str(RULES)], "evaluation_interval": "10s",
        "tests": [{"interval": "10s", "input_series": series, "alert_rule_test": tests}],
    }  # fmt: skip
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(document))
    done = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True, check=False)
    found = re.findall(r"alertname: (\w+), time: (\S+),", done.stdout + done.stderr)
    assert found or done.returncode == 0, done.stdout + done.stderr
    said: dict[float, set[str]] = {minute: set() for minute in at_minutes}
    for name, time in found:
        seconds = sum(
            int(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in re.findall(r"(\d+)([hms])", time)
        )
        said[min(said, key=lambda minute: abs(60 * minute - seconds))].add(name)
    return said


@needs_promtool
def test_alerts_on_the_series_of_a_real_server(tmp_path: Path) -> None:
    """``step_load.json``: a server of four at a time under 2, 32, 2 and 0 streams, then stopped; 24 were let in."""
    series = [series_of(one["labels"], one["values"]) for one in recorded()["series"]]
    heavy, after, dead = phase_minute("heavy"), phase_minute("light again"), phase_minute("dead")
    at = [heavy, heavy + 5, after - 0.2, dead - 0.2, dead + 2, dead + 6.5]
    said = firing(tmp_path, at, series)
    assert said[at[0]] == set()  # two streams on a server of four
    # Six are refused all the time; the queue has not stood for ten minutes yet.
    assert "MinitronRefusing" in said[at[1]] or "MinitronRefusing" in said[at[2]]
    assert not said[at[1]] & {"MinitronQueueStands", "MinitronNoServer", "MinitronNoTokens", "MinitronErrors"}
    assert "MinitronQueueStands" in said[at[2]]
    # Two minutes idle: what the rates of five minutes still see, and nothing of what a server is or holds.
    assert said[at[3]] <= {"MinitronRefusing", "MinitronSlowFirstToken"}
    assert "MinitronNoServer" in said[at[4]]
    assert {"MinitronNoServer", "MinitronErrors"} <= said[at[5]]


ITL, TTFT = "minitron_gateway_inter_token_latency_seconds_bucket", "minitron_gateway_time_to_first_token_seconds_bucket"


def slow(histogram: str, below: str, above: str) -> list[tuple[str, str]]:
    """Nine observations a step, all of them between two bounds."""
    counts = {below: "0x120", above: "0+9x120", "+Inf": "0+9x120"}
    return [(f'{histogram}{{job="g",le="{bound}"}}', values) for bound, values in counts.items()]


BY_HAND = {
    "MinitronServerNotReady": [('minitron_gateway_upstream_ready{job="g",upstream="a"}', "0x120"),
                               ('minitron_gateway_upstream_ready{job="g",upstream="b"}', "1x120")],
    "MinitronNoTokens": [('minitron_gateway_streams{job="g"}', "3x120"),
                         ('minitron_gateway_generated_tokens_total{job="g"}', "700x120")],
    "MinitronBrokenStreams": [('minitron_gateway_broken_streams_total{job="g"}', "0x90 4x30")],
    "MinitronSlowTokens": slow(ITL, "0.25", "0.5"),
    "MinitronSlowFirstToken": slow(TTFT, "2.5", "5.0"),
    "MinitronKvCacheFull": [('nv_trt_llm_kv_cache_block_metrics{model="m",kv_cache_block_type="fraction"}', "0.99x120"),
                            ('nv_trt_llm_general_metrics{model="m",general_type="iteration_counter"}', "0+50x120")],
}  # fmt: skip


@needs_promtool
@pytest.mark.parametrize(("name", "series"), BY_HAND.items(), ids=list(BY_HAND))
def test_alerts_that_the_recording_has_no_case_of(name: str, series: list[tuple[str, str]], tmp_path: Path) -> None:
    """Series by hand, of what each page says."""
    written = [{"series": one, "values": values} for one, values in series]
    said = firing(tmp_path, [1, 19], written)
    assert said[1] == set() and name in said[19]


def expressions() -> list[tuple[str, str]]:
    """(panel, query) of the board."""
    board = json.loads((chart.CHART / "files" / "dashboard.json").read_text(encoding="utf-8"))
    return [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", [])]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, small_repository: Any) -> Iterator[Monitored]:
    """A server that has just had half a minute of load, scraped every second."""
    folder = tmp_path_factory.mktemp("monitored")
    with monitored(small_repository("int8_weight_only"), folder, scrape_s=1, max_streams=8) as running:
        running.prometheus.wait_for("minitron_gateway_upstream_ready == 1")
        asyncio.run(load(running.gateway.address, 10, 30, max_tokens=60))
        yield running


@needs_prometheus
@pytest.mark.slow
@pytest.mark.server
def test_no_query_of_the_board_is_empty(loaded: Monitored) -> None:
    """Every one, asked of a Prometheus that scraped a loaded server."""
    empty = []
    for panel, expression in expressions():
        asked = (
            re.sub(r"\$(gateway|triton)", ".*", expression)
            .replace("$__rate_interval", "1m")
            .replace("$roofline", "100")
        )
        assert "$" not in asked, asked
        try:  # a scrape that a busy machine missed leaves a moment without any
            values = [float(one["value"][1]) for one in loaded.prometheus.wait_for(asked, 10)]
        except AssertionError:
            values = []
        if not values or any(map(math.isnan, values)):
            empty.append((panel, asked, values))
    assert not empty


@needs_prometheus
@pytest.mark.slow
@pytest.mark.server
def test_the_rules_record_what_the_engine_says(loaded: Monitored) -> None:
    """Ten streams, eight of which the gateway takes, on an engine: the rest waits in the executor, not in Triton."""
    for rule in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"]:
        assert loaded.prometheus.wait_for(rule["record"]), rule["record"]
    most = loaded.prometheus.query(
        "max_over_time(minitron:requests_waiting[1m]) + max_over_time(minitron:requests_scheduled[1m])"
    )
    assert 1 <= float(most[0]["value"][1]) <= 16
    # The gateway's own count of tokens is the engine's, but for the four of the server's first request.
    loaded.prometheus.wait_for(
        "abs(sum(minitron_gateway_generated_tokens_total) - sum(nv_llm_output_token_len_sum)) < 64"
    )
