"""The README's plots: drawn of what is kept in benches/results, at the places that a calculation by hand gives."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import plots
import pytest

from conftest import minitron_here

SVG = "{http://www.w3.org/2000/svg}"


def row(precision: str, execution: str = "fast", **sides: tuple[float, ...]) -> dict[str, Any]:
    """As bench-cpu writes it: tokens/s at 1, 4 and 16 streams, or fewer, of each side."""
    names = ("one_stream", "four_streams", "sixteen_streams")
    figures = {
        side: {name: {"median": rate} for name, rate in zip(names, rates, strict=False)}
        for side, rates in sides.items()
    }
    return {"precision": precision, "execution": execution, "head": "as_is", "figures": figures}


ROWS = [
    row("bfloat16", server=(2.0, 4.0, 5.0), bare=(9.0, 9.0, 9.0)),
    row("int8_weight_only", server=(2.5, 4.0), native=(3.0, 6.0)),
]


def drawn(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(plots.page(text))


def scale(svg: ElementTree.Element, *, across: bool) -> Any:
    """Pixels to values, read from two of the ticks: those below the axis are centred, those left of it end there."""
    ticks = []
    for text in svg.iter(f"{SVG}text"):
        number = re.fullmatch(r"\d+", text.text or "")
        is_left = text.get("text-anchor") == "end" and float(text.get("x", 0)) < 64
        if number and (text.get("text-anchor") == "middle" if across else is_left):
            ticks.append((float(text.get("x", 0)) if across else float(text.get("y", 0)) - 4, int(number[0])))
    (a, low), (b, high) = ticks[0], ticks[-1]
    return lambda pixel: low + (pixel - a) / (b - a) * (high - low)


def lines(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The points of each line, in the axes' units."""
    x, y = scale(svg, across=True), scale(svg, across=False)
    found = []
    for line in svg.iter(f"{SVG}polyline"):
        pairs = [pair.split(",") for pair in line.get("points", "").split()]
        found.append([(x(float(a)), y(float(b))) for a, b in pairs])
    return found


def kept(name: str) -> Mapping[str, Any]:
    (one,) = (one for one in plots.ALL if one.name == name)
    document: Mapping[str, Any] = json.loads((plots.RESULTS / one.source).read_text(encoding="utf-8"))
    return document


def test_memory_is_weights_cache_and_what_is_set_aside() -> None:
    """By hand, int8: 5,767,180,416 bytes of weights (docs/plan.md), 131,072 for a token (2 x 32 layers x 8 heads x 128
    x 2 bytes), 32 sequences, 1 GiB and 783,128,986 bytes set aside: 7.62 GB, and 24.80 at 4,096 tokens."""
    svg = drawn(plots.memory(kept("memory")))
    _, int8, _ = lines(svg)
    assert int8[0] == pytest.approx((0, 7.62), abs=0.1)
    assert int8[-1] == pytest.approx((4096, 24.80), rel=0.01)


def test_the_kept_plan_is_what_plan_says_today() -> None:
    code, out, _ = minitron_here("plan", "--recipe", "a100-int8", "--json")
    assert code == 0
    assert [json.loads(out)[one] == kept("memory")[one] for one in ("weights", "memory", "limits", "gpu")] == [True] * 4


def test_throughput_is_of_all_streams_and_latency_of_one() -> None:
    """Four streams that get 4 tokens/s together wait a second for each; sixteen with 5 tokens/s wait 3.2."""
    svg = drawn(plots.throughput({"machine": {}, "rows": ROWS}))
    sixteen_bits, int8, native = lines(svg)
    assert sixteen_bits == [pytest.approx(point, rel=0.02) for point in ((500, 2), (1000, 4), (3200, 5))]
    assert int8 == [pytest.approx(point, rel=0.02) for point in ((400, 2.5), (1000, 4))]
    assert native == [pytest.approx(point, rel=0.02) for point in ((333, 3), (667, 6))]
    words = {text.text for text in svg.iter(f"{SVG}text")}
    assert {"bfloat16, fast", "int8, fast", "llama.cpp, native", "1", "4", "16"} <= words


def test_a_front_is_a_point() -> None:
    ways = {name: {"rounds": [{"tokens_per_s": rate} for rate in (900, rate, 9000)], "ttft_p50_ms": ttft}
            for name, rate, ttft in (("direct", 3000.0, 13.0), ("text_model", 2500.0, 35.0), ("gateway", 3100.0, 36.0),
                                     ("gateway_2_workers", 3050.0, 69.0))}  # fmt: skip
    svg = drawn(plots.front({"streams": 64, "ways": ways}))
    x, y = scale(svg, across=True), scale(svg, across=False)
    found = [(x(float(one.get("cx", 0))), y(float(one.get("cy", 0)))) for one in svg.iter(f"{SVG}circle")]
    expected = ((13, 3000), (35, 2500), (36, 3100), (69, 3050))
    assert found == [pytest.approx(point, rel=0.02) for point in expected]


def test_the_committed_plots_are_those_of_the_kept_figures() -> None:
    for one in plots.ALL:
        path = plots.PLOTS / f"{one.name}.svg"
        assert path.exists() == (plots.RESULTS / one.source).exists()
        if path.exists():
            assert path.read_text(encoding="utf-8") == plots.page(one.draw(kept(one.name))), "make plots"
            assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")
