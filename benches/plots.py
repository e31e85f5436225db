"""The README's figures as plots: ``docs/plots/*.svg`` from the JSON that was kept of a run in ``benches/results``.

A plot without its JSON is left as it is, and the command that measures it is said. Colours follow the reader's scheme,
light or dark, as those of docs/way.svg do.

    python benches/plots.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.svg import Series, plot

HERE = Path(__file__).parent
RESULTS, PLOTS = HERE / "results", HERE.parent / "docs" / "plots"
_STREAMS = {"one_stream": 1, "four_streams": 4, "sixteen_streams": 16}
_WAYS = {"direct": "tensorrt_llm itself", "text_model": "text model", "gateway": "gateway",
         "gateway_2_workers": "gateway, 2 workers"}  # fmt: skip
#: Lines of the plan that can be told apart: those left out are as large as one of these, by less than one percent.
_SIZES = {"float16": "16-bit", "int8_weight_only": "int8", "int4_weight_only": "int4"}
_LONGEST, _POINTS = 4096, 9
_STYLE = """<style>
  text { fill: #1f2328 } .title { font-size: 13px; font-weight: 600 }
  .axis { fill: none; stroke: #59636e } .grid { stroke: #d1d9e0 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .axis { stroke: #9198a1 } .grid { stroke: #30363d }
    [stroke="#0072b2"] { stroke: #4aa3e0 } [fill="#0072b2"] { fill: #4aa3e0 }
  }
</style>"""


@dataclass(frozen=True)
class Plot:
    """``source``: the file in ``results`` that it is drawn from; ``command``: what writes it, to ``{}``."""

    name: str
    source: str
    command: str
    draw: Callable[[Mapping[str, Any]], str]


def throughput(document: Mapping[str, Any]) -> str:
    """Tokens/s against the time between two tokens of a stream, for each row of bench-cpu at 1, 4 and 16 streams."""
    return plot(
        "CPU engine: throughput against latency, 1, 4 and 16 streams", "ms between the tokens of a stream",
        "tokens/s of all streams", list(_by_precision(document["rows"])), x_from_zero=True,
    )  # fmt: skip


def _by_precision(rows: list[Mapping[str, Any]]) -> Iterator[Series]:
    """A line for each row's server, and one for each llama.cpp beside it."""
    for row in rows:
        ours = f"{_short(row['precision'])}, {row['execution']}"
        for side, name in (("server", ours), *((peer, f"llama.cpp, {peer}") for peer in ("wheel", "native"))):
            if measured := _rates(row["figures"].get(side, {})):
                yield Series(
                    name, [count / rate * 1e3 for count, rate in measured.items()], list(measured.values()),
                    labels=list(map(str, measured)),
                )  # fmt: skip


def _rates(figures: Mapping[str, Any]) -> dict[int, float]:
    return {count: figures[name]["median"] for name, count in _STREAMS.items() if name in figures}


def _short(precision: str) -> str:
    return precision.removesuffix("_weight_only")


def memory(document: Mapping[str, Any]) -> str:
    """Bytes of one GPU against the tokens that each sequence of a full batch holds, for each precision.

    What the plan sets aside for activations and runtime is that of its own precision and limits.
    """
    set_aside = document["memory"]["activation_bytes"] + document["memory"]["runtime_bytes"]
    batch, per_token = document["limits"]["max_batch_size"], document["memory"]["kv_bytes_per_token"]
    tokens = [_LONGEST * step // (_POINTS - 1) for step in range(_POINTS)]
    lines = [
        Series(shown, tokens, [(set_aside + sizes["total"] + batch * per_token * one) / 1e9 for one in tokens])
        for name, sizes in document["weights"].items() if (shown := _SIZES.get(name))
    ]  # fmt: skip
    gpu = document["gpu"]["name"]
    return plot(f"Planned for {gpu}: memory of {batch} sequences", "tokens of each sequence", "GB", lines)


def front(document: Mapping[str, Any]) -> str:
    """Tokens/s of all streams against the median time to the first token, for each way from text to tokens."""
    points = []
    for name, shown in _WAYS.items():
        way = document["ways"][name]
        rate = statistics.median(one["tokens_per_s"] for one in way["rounds"])
        points.append(Series(shown, [way["ttft_p50_ms"]], [rate], labels=[f"{rate:,.0f}"]))
    return plot(
        f"Fronts: throughput of {document['streams']} streams against the first token",
        "ms to the first token, median, of streams that begin evenly", "tokens/s of all streams", points,
        x_from_zero=True,
    )  # fmt: skip


ALL = (
    Plot("throughput", "cpu-4b.json", 'make bench-cpu ARGS="--shape 4b" JSON={}', throughput),
    Plot("memory", "plan-a100-int8.json", "minitron plan --recipe a100-int8 --json > {}", memory),
    Plot("front", "front.json", "make bench-front JSON={}", front),
)


def page(text: str) -> str:
    """A plot as a file of its own: it has the report's shapes, and here its own style."""
    head, rest = text.split(">", 1)
    own = '<svg xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" font-size="11" '
    opened = head.replace("<svg ", own)
    return f"{opened}>\n{_STYLE}\n{rest}\n".replace("/><", "/>\n<").replace("</text><", "</text>\n<")


def main() -> None:
    """Draw what has been measured."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PLOTS.mkdir(exist_ok=True)
    for one in ALL:
        source = RESULTS / one.source
        if not source.is_file():
            print(f"{one.name}: not measured; {one.command.format(f'benches/results/{one.source}')}")
            continue
        drawn = page(one.draw(json.loads(source.read_text(encoding="utf-8"))))
        (PLOTS / f"{one.name}.svg").write_text(drawn, encoding="utf-8")
        print(f"{one.name}: docs/plots/{one.name}.svg")


if __name__ == "__main__":
    main()
