"""Reports of load tests: slices put together, comparisons with intervals, CSV, JSON and the page.

Runs are made up here record by record, so that every expected figure follows from how they were made.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT, minitron
from minitron.svg import Series, plot
from minitron_client.bench.profile import Profile, Slo
from minitron_client.bench.record import Record
from minitron_client.bench.summary import Window, summarize
from minitron_client.report import page, reading
from minitron_client.report.comparison import compare

pytestmark = pytest.mark.slow

S = 10**9


def records(seed: int, *, slower: float = 1.0, start_ns: int = 0) -> list[Record]:
    """200 requests, ten a second, TTFT about 50 ms (times ``slower``), then a token every 10 ms."""
    draw = np.random.default_rng(seed)
    made = []
    for index in range(200):
        sent = start_ns + index * S // 10
        first = sent + int(draw.lognormal(np.log(50e6 * slower), 0.3))
        responses: list[tuple[int, int | None]] = [(first + i * 10**7, 1) for i in range(8)]
        made.append(Record(index, sent, sent, responses, responses[-1][0], 12, 8, "ok"))
    return made


def write_run(
    folder: Path, made: list[Record], *, start_ns: int = 0, number: int = 1, of: int = 1, **more: Any
) -> Path:
    """A run's folder as ``minitron bench`` leaves it."""
    folder.mkdir(exist_ok=True)
    name = f"requests-{number}-of-{of}-1.jsonl"
    (folder / name).write_text("".join(one.line() for one in made))
    window = Window(start_ns + 2 * S, start_ns + 20 * S)
    summary = summarize(made, window, Slo())
    document = {
        "kind": "load", "schema": 1, "toolkit": "0", "created": "now", "machine": {}, "stopped": None,
        "profile": Profile().model_dump(mode="json"), "slice": {"number": number, "of": of}, "start_ns": start_ns,
        "window": vars(window), "records": [name], "summary": summary.document(window),
        "stalls": [], "workers": [], "server": {"samples": []}, "url": "host:1", "model": "<model> & co",
        "server_version": "2.51.0", "lengths": "fixed", **more,
    }  # fmt: skip
    (folder / ("run.json" if of == 1 else f"run-{number}-of-{of}.json")).write_text(json.dumps(document))
    return folder


def test_slices_of_different_machines_make_the_whole(tmp_path: Path) -> None:
    made = records(1)
    whole = reading.read(write_run(tmp_path / "whole", made))
    for number, clock in ((1, 5_000 * S), (2, 70 * S)):  # every machine has a clock of its own
        moved = [one for one in records(1, start_ns=clock) if one.index % 2 == number - 1]
        write_run(tmp_path / "sliced", moved, start_ns=clock, number=number, of=2)
    together = reading.read(tmp_path / "sliced")
    assert together.document["summary"] == whole.document["summary"]
    assert [vars(one) for one in together.records] == [vars(one) for one in whole.records]
    (tmp_path / "sliced" / "run-2-of-2.json").unlink()
    done = minitron("report", tmp_path / "sliced", check=False)
    assert done.returncode == 3 and "slices [1] of 2" in done.stderr


def test_only_real_differences_are_called_real(tmp_path: Path) -> None:
    first = reading.read(write_run(tmp_path / "a", records(1)))
    same = reading.read(write_run(tmp_path / "b", records(2)))
    slow = reading.read(write_run(tmp_path / "c", records(3, slower=1.5)))
    medians = {one.metric: one for one in compare(first, same) if one.share == 50}
    assert not medians["TTFT (intended)"].real and not medians["ITL"].real
    medians = {one.metric: one for one in compare(first, slow) if one.share == 50}
    assert medians["TTFT (intended)"].real and medians["TTFT (intended)"].ratio.value == pytest.approx(1.5, rel=0.1)
    assert medians["ITL"].ratio.value == 1 and not medians["ITL"].real


def test_a_percentile_of_too_few_requests_is_in_no_table(tmp_path: Path) -> None:
    """20 requests inside the window: a p50, no p99 of theirs; 140 times between tokens have one."""
    few = [write_run(tmp_path / name, records(seed)[:40]) for name, seed in (("a", 1), ("b", 2))]
    done = minitron("report", *few)
    rows = [line.split() for line in done.stdout.partition("b beside a")[0].splitlines()]
    assert ["TTFT,", "intended", "p99", "ms", "-", "-"] in rows and ["ITL", "p99", "ms", "10.00", "10.00"] in rows
    assert done.stdout.count("of too few values") == 1
    assert {(one.metric, one.share) for one in compare(reading.read(few[0]), reading.read(few[1]))} == {
        ("TTFT (intended)", 50), ("ITL", 50), ("ITL", 99), ("TPOT", 50), ("E2E (intended)", 50)}  # fmt: skip
    assert '<td class="n">-</td>' in (tmp_path / "a" / "report.html").read_text()


def test_csv_has_a_row_for_each_request(tmp_path: Path) -> None:
    made = records(1)
    folder = write_run(tmp_path / "a", made)
    minitron("report", folder, "--csv", tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(rows) == 200 and sum(int(row["in_window"]) for row in rows) == 180
    assert float(rows[7]["ttft_ms"]) == pytest.approx((made[7].timing.ttft_ns or 0) / 1e6, abs=1e-3)
    assert rows[7]["output_tokens"] == "8" and float(rows[7]["tpot_ms"]) == 10


def test_json_is_one_document_with_the_differences(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, records(seed)) for name, seed in (("a", 1), ("b", 2))]
    report = json.loads(minitron("report", *runs, "--json").stdout)
    assert [one["name"] for one in report["runs"]] == ["a", "b"]
    assert report["differences"][0]["beside"] == "a" and "real" in report["differences"][0]["figures"][0]


class Collector(HTMLParser):
    """Tags, addresses and text of a page; fails on tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    stall = {"at_s": 3.0, "seconds": 1.0, "waiting": 4}
    runs = [write_run(tmp_path / "a", records(1), stalls=[stall]), write_run(tmp_path / "b", records(2))]
    minitron("report", *runs, "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    collector = Collector()
    collector.feed(text)
    assert collector.open == [] and collector.tags.count("svg") == 7 and "script" not in collector.tags
    assert collector.addresses == ["data:,"] and "http" not in text
    assert "&lt;model&gt; &amp; co" in text and "1.00 s at 3.0 s" in text and "real" in text


def test_a_capacity_search_is_drawn_with_its_knee(tmp_path: Path) -> None:
    def run(rate: float) -> dict[str, Any]:
        ttft = {"p50": 5 * rate, "p99": 9 * rate}
        summary = {"requests_per_s": rate, "goodput_share": 1.0, "latency_ms": {"ttft_intended": ttft}}
        return {"rate": rate, "carried": rate < 5, "stopped": None, "summary": summary}

    tried = [run(rate) for rate in (1.0, 2.0, 4.0, 8.0)]
    document = {"kind": "capacity", "schema": 1, "profile": {}, "goodput_bound": 0.95, "capacity_per_s": 4.0,
                "lengths": "fixed", "runs": tried}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(document))
    text = page.render([reading.read(tmp_path)])
    assert "capacity 4 requests/s" in text and text.count("<svg") == 1 and 'class="mark"' in text


def test_plots_of_little_or_nothing() -> None:
    assert "nothing was measured" in plot("t", "x", "y", [Series("a", [], [])])
    assert "<circle" in plot("t", "x", "y", [Series("a", [3.0], [3.0], dots=True)])
    assert "&lt;t&gt;" in plot("<t>", "x", "y", [Series("a", [1, 1000], [0, 0])], log_x=True)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for content in (None, "broken", "{}", '{"kind": "latency", "schema": 1}'):
        if content is not None:
            (tmp_path / "run.json").write_text(content)
        done = minitron("report", tmp_path, check=False)
        assert done.returncode == 3 and done.stderr.count("\n") == 1


@pytest.mark.browser
def test_the_page_in_a_real_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser, "this test needs Chromium (Debian: apt install chromium)"
    runs = [write_run(tmp_path / "a", records(1)), write_run(tmp_path / "b", records(2, slower=1.3))]
    minitron("report", *runs, "--html", tmp_path / "page.html")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,2600", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]  # fmt: skip
    address = (tmp_path / "page.html").as_uri()
    shown = subprocess.run(
        [browser, *options, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=120
    )
    assert shown.stdout.count("<svg") == 7 and shown.stdout.count("<polyline") >= 10 and "CONSOLE" not in shown.stderr
    picture = tmp_path / "page.png"
    subprocess.run(
        [browser, *options, f"--screenshot={picture}", address], check=True, capture_output=True, timeout=120
    )
    assert picture.stat().st_size > 50_000
    assert (ROOT / "docs" / "load-report.png").is_file(), "the documentation shows such a page"
