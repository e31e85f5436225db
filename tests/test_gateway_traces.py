"""Traces from a client through the gateway to a server, seen by a collector that is none of ours (``otlp``).

Expected names are those of OpenTelemetry's semantic conventions for HTTP and generative AI; how a parent is known, of
W3C's Trace Context. The server is ``bare_triton``, which notes the metadata of every request, or the real Triton.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import otlp
from bare_process import Bare, prompt
from conftest import ROOMS, ROOT, SMALL_MODEL, minitron, minitron_here
from gateway_process import Gateway
from minitron import tracing
from minitron.errors import InvalidRequest
from minitron_client.client import Client, Request

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
SERVER, CLIENT = 2, 3  # SpanKind of opentelemetry-proto
NO_ENDPOINT = dict.fromkeys(("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"), "")
WORDS = prompt(tokens=5, interval_ms=0)


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_") or name == "TRACEPARENT"]:
        monkeypatch.delenv(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[otlp.Collector]:
    """A collector that the environment names to every program that is started."""
    with otlp.collector() as one:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", one.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield one


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    one = Bare(tmp_path_factory.mktemp("bare"), "--tokenizer", str(SMALL_MODEL))
    yield one
    one.end()


def told(server: Bare) -> dict[str, str]:
    """Headers of a trace in the metadata of the last request."""
    metadata = server.events("request")[-1]["metadata"]
    return {name: metadata[name] for name in ("traceparent", "tracestate") if name in metadata}


@dataclass
class Run:
    """What a gateway was asked, and what was seen of it: the spans that came, and the headers that its server got."""

    spans: list[otlp.Span]
    raw: list[bytes]
    told: list[dict[str, str]]
    prompt_tokens: int

    def named(self, name: str, status: int | None = None) -> otlp.Span:
        (one,) = (
            one for one in self.spans
            if one.name == name and status in (None, one.attributes.get("http.response.status_code"))
        )  # fmt: skip
        return one


@pytest.fixture(scope="module")
def run(server: Bare) -> Iterator[Run]:
    """``minitron generate`` and five requests through a gateway whose workers send their spans only when they end."""
    with otlp.collector() as collector, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
        patch.setenv("TRACEPARENT", SAMPLED)
        gateway = Gateway("--upstream", server.url, "--workers", "2")
        minitron("generate", WORDS, "--url", gateway.document["url"], "--max-tokens", "5", "--stop", "a secret word")
        one = Run([], collector.raw, [told(server)], len(server.events("request")[-1]["inputs"]["input_ids"]))
        body = {"model": "minitron", "prompt": WORDS, "max_tokens": 5}
        broken = body | {"prompt": prompt(tokens=5, error="no", error_after=0)}
        for path, asked, expected, trace in (
            ("/v1/completions", body, 200, UNSAMPLED),
            ("/v1/completions", broken, 500, SAMPLED),
            ("/v1/completions", b"{", 400, SAMPLED),
            ("/v1/chat/completions", body, 400, "00-broken"),
            ("/v1/completions", body | {"stop": "1", "n": 2}, 200, f"00-{'0' * 32}-{SPAN}-01"),
        ):
            assert gateway.ask(path, asked, traceparent=trace)[0] == expected
            one.told.append(told(server))
        assert gateway.end()[0] == 0
        one.spans = collector.spans
        yield one


def test_one_trace_from_client_to_server(run: Run) -> None:
    client = run.named("text_completion minitron")
    (served,) = (one for one in run.spans if one.parent == client.span)
    assert [client.trace, client.parent, client.kind] == [TRACE, SPAN, CLIENT]
    assert [served.trace, served.name, served.kind] == [TRACE, "POST /v1/completions", SERVER]
    assert [client.service, served.service] == ["minitron-generate", "minitron-gateway"]
    assert run.told[0] == {"traceparent": f"00-{TRACE}-{served.span}-01"}
    for one in (client, served):
        assert {name: one.attributes[name] for name in EXPECTED} == EXPECTED
        assert one.attributes["gen_ai.usage.input_tokens"] == run.prompt_tokens and not one.is_error
    assert served.attributes["http.response.status_code"] == 200
    assert 0 < served.events["first_token"]["gen_ai.response.time_to_first_chunk"] < 60
    assert 0 < client.attributes["gen_ai.response.time_to_first_chunk"] < 60


def test_no_prompt_and_no_answer_is_in_a_span(run: Run) -> None:
    assert run.raw and not any(word in raw for raw in run.raw for word in (b"interval_ms", b"secret"))


EXPECTED = {
    "gen_ai.operation.name": "text_completion", "gen_ai.request.model": "minitron", "gen_ai.request.max_tokens": 5,
    "gen_ai.request.stream": True, "gen_ai.usage.output_tokens": 5, "gen_ai.response.finish_reasons": ["length"],
}  # fmt: skip


def test_what_is_not_sampled_is_neither_sent_nor_told_to_triton(run: Run) -> None:
    """Triton would trace it all the same."""
    assert run.told[1] == {}
    of_ours = [one for one in run.spans if one.parent == SPAN and one.kind == SERVER]
    assert {one.attributes["http.response.status_code"] for one in of_ours} == {500, 400} and len(run.spans) == 6


def test_what_fails_is_an_error_and_a_client_s_fault_is_none(run: Run) -> None:
    """Semantic conventions for HTTP: a server's span of status 4xx is no error."""
    failed, wrong = run.named("POST /v1/completions", 500), run.named("POST /v1/completions", 400)
    assert {failed.trace, wrong.trace} == {TRACE} and failed.is_error and not wrong.is_error
    assert failed.attributes["error.type"] == "500"


def test_a_malformed_traceparent_begins_a_trace_of_its_own(run: Run) -> None:
    chat = run.named("POST /v1/chat/completions")
    (fresh,) = (one for one in run.spans if one.parent == "" and one.name == "POST /v1/completions")
    assert chat.parent == "" and chat.attributes["gen_ai.operation.name"] == "chat"
    assert len({chat.trace, fresh.trace, TRACE, "0" * 32}) == 4
    # Level 2 of the specification: flag 01 for sampled, 02 for an id that was made at random.
    assert run.told[-1] == {"traceparent": f"00-{fresh.trace}-{fresh.span}-03"}
    assert fresh.attributes["gen_ai.request.choice.count"] == 2
    assert len(fresh.attributes["gen_ai.response.finish_reasons"]) == 2


def test_without_an_endpoint_headers_go_on_and_nothing_else_happens(
    server: Bare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # every import becomes a line on stderr
    for name in NO_ENDPOINT:
        monkeypatch.setenv(name, "")  # the specification: as if it were not set
    gateway = Gateway("--upstream", server.url, log=tmp_path / "log")
    body = {"model": "minitron", "prompt": WORDS, "max_tokens": 5}
    for headers, expected in (
        ({"traceparent": SAMPLED, "tracestate": "rojo=1"}, {"traceparent": SAMPLED, "tracestate": "rojo=1"}),
        ({"traceparent": SAMPLED.upper(), "tracestate": "rojo=1"}, {}),
        ({"traceparent": UNSAMPLED}, {}),
        ({}, {}),
    ):
        assert gateway.ask("/v1/completions", body, **headers)[0] == 200
        assert told(server) == expected
    assert gateway.end()[0] == 0
    imported = (tmp_path / "log").read_text()
    assert "minitron_gateway.app" in imported and "opentelemetry" not in imported


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        # The specification's own examples: the signal's path is added to the one, and the other is taken as it is.
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, "http://collector:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/mycollector/"}, "http://collector:4318/mycollector/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a:1/x", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:2"}, "http://a:1/x"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:2", "OTEL_SDK_DISABLED": "TRUE"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:2", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:2", "OTEL_TRACES_EXPORTER": "otlp,console"}, "http://b:2/v1/traces"),
    ],
)  # fmt: skip
def test_where_traces_go_is_opentelemetry_s_own_variables(variables: dict[str, str], url: str | None) -> None:
    assert tracing.endpoint(variables) == url


@pytest.mark.parametrize(
    ("variables", "modules", "said"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, {}, "http/protobuf"),
        ({}, {"opentelemetry.sdk": None}, "pip install '.[otel]' in the checkout"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, {}, "max_queue_size"),
    ],
)
def test_what_keeps_traces_from_being_sent_is_a_warning(
    variables: dict[str, str], modules: dict[str, Any], said: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for name, value in (variables | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}).items():
        monkeypatch.setenv(name, value)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.sdk")]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    tracing.start("one")
    assert said in caplog.text


APPLICATION = """
import asyncio, json, sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from minitron_client import AsyncClient, Client

out = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(out))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("application")

async def ask(url, words):
    async with AsyncClient(url) as client:
        with tracer.start_as_current_span("asynchronous"):
            await client.generate(words, max_tokens=5)

url, words, refused = sys.argv[1:]
with Client(url) as client:
    with tracer.start_as_current_span("blocking"):
        for chunk in client.stream(words, max_tokens=5):
            pass
    with tracer.start_as_current_span("left"):
        next(client.stream(words, max_tokens=5))
    with tracer.start_as_current_span("refused"):
        try:
            client.generate(refused, max_tokens=5)
        except Exception as error:
            pass
asyncio.run(ask(url, words))
print(json.dumps([[span.name, f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}",
                   f"{span.parent.span_id:016x}" if span.parent else "", dict(span.attributes)]
                  for span in out.get_finished_spans()], default=list))
"""


def test_an_application_s_own_spans_have_the_client_s_as_children(bare: Bare) -> None:
    """It chose its SDK itself; no endpoint is named."""
    refused = prompt(error="Requested output length (5): max_seq_len is 3", error_after=0)
    done = subprocess.run(
        [sys.executable, "-c", APPLICATION, bare.url, WORDS, refused],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / room) for room in ROOMS)},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    spans = {span: (name, trace, *rest) for name, trace, span, *rest in json.loads(done.stdout)}
    children = {spans[parent][0]: span for span, (_, _, parent, _) in spans.items() if parent}
    assert set(children) == {"blocking", "left", "refused", "asynchronous"} and len(spans) == 8
    host, port = bare.url.split(":")
    for mother, span in children.items():
        name, trace, parent, attributes = spans[span]
        assert name == "text_completion tensorrt_llm_bls" and trace == spans[parent][1]
        assert [attributes["server.address"], attributes["server.port"]] == [host, int(port)]
        assert attributes.get("error.type") == ("InvalidRequest" if mother == "refused" else None)
    sent = [event["metadata"].get("traceparent") for event in bare.events("request")]
    for span in children.values():
        assert f"00-{spans[span][1]}-{span}-03" in sent  # sampled, and the id is made at random
    assert spans[children["blocking"]][3]["gen_ai.usage.output_tokens"] == 5


def test_a_request_may_name_its_trace(bare: Bare) -> None:
    with Client(bare.url) as client:
        for given, expected in ((SAMPLED, {"traceparent": SAMPLED}), (UNSAMPLED, {}), (None, {})):
            client.generate(Request("one", traceparent=given))
            assert told(bare) == expected
        with pytest.raises(InvalidRequest, match="traceparent is '00-broken'"):
            client.generate("one", traceparent="00-broken")


@pytest.mark.parametrize("server", ["bundled", "container"])
def test_triton_gets_its_trace_mode_where_a_collector_is_named(
    server: str, echo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings: Triton's user guide, "Server Trace"."""

    def flags(*more: str) -> set[str]:
        code, out, err = minitron_here("serve", echo, "--dry-run", "--server", server, *more)
        assert code == 0, err
        return {word.partition("=")[2] for word in out.split() if word.startswith("--trace-config")}

    assert flags() == set()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    expected = {
        "mode=opentelemetry", "level=TIMESTAMPS", "rate=0", "opentelemetry,url=http://collector:4318/v1/traces",
        "opentelemetry,resource=service.name=minitron-triton", "opentelemetry,bsp_schedule_delay=1000",
    }  # fmt: skip
    assert flags() == expected
    assert flags("--trace-rate", "100") == expected - {"rate=0"} | {"rate=100"}
    other = "opentelemetry,resource=service.name=mine"  # the user's own flag takes the place of ours
    ours = {"opentelemetry,resource=service.name=minitron-triton"}
    assert flags("--", f"--trace-config={other}") == expected - ours | {other}
    assert minitron_here("serve", echo, "--dry-run", "--trace-rate", "-1")[0] == 2


@pytest.mark.server
@pytest.mark.slow
def test_a_trace_goes_on_through_triton_and_the_text_model(
    collector: otlp.Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``generate`` straight at the server: its span, Triton's of the text model, and of the engine that this asks."""
    import hand_made
    from serving import server as serve

    monkeypatch.setenv("TRACEPARENT", SAMPLED)
    with serve(hand_made.echo_repository(tmp_path), "--exit-timeout", "10", "--openai", "0") as document:
        minitron("generate", "a", "--max-tokens", "3", "--url", document["urls"]["grpc"])
        collector.named("InferRequest", 2)
        monkeypatch.setenv("TRACEPARENT", UNSAMPLED)
        minitron("generate", "a", "--max-tokens", "3", "--url", document["urls"]["grpc"])
        monkeypatch.setenv("TRACEPARENT", SAMPLED.replace(TRACE, TRACE[::-1]))
        through_gateway = _asked_until_told(collector, f"http://{document['urls']['openai']}/v1")
    (first, second) = collector.named("text_completion tensorrt_llm_bls")[0], collector.named("tensorrt_llm_bls")[0]
    inner = next(one for one in collector.named("InferRequest", 3) if one.parent == second.span)
    outer = next(one for one in collector.named("InferRequest", 3) if one.parent == first.span)
    assert first.parent == SPAN and second.parent == outer.span and outer.service == "minitron-triton"
    assert {one.trace for one in (first, second, inner, outer)} == {TRACE}
    assert inner.span in [one.parent for one in collector.named("tensorrt_llm", 2)]
    gateways = collector.named("POST /v1/completions")
    assert {one.service for one in gateways} == {"minitron-gateway"}
    assert through_gateway.parent in {one.span for one in gateways}
    assert {one.trace for one in collector.spans} == {TRACE, TRACE[::-1]}
    # Nothing of the one that is not sampled, nor of probes: their parents were not sent.
    assert {one.parent for one in collector.named("InferRequest")} <= {one.span for one in collector.spans}


def _asked_until_told(collector: otlp.Collector, url: str) -> otlp.Span:
    """Triton's span of a request through the gateway. On a machine that is busy it loses some: one in four, seen."""
    for _ in range(3):
        minitron("generate", "a", "--max-tokens", "3", "--url", url)
        with contextlib.suppress(AssertionError):
            return collector.named("InferRequest", 3)[-1]
    raise AssertionError("none of three came")
