"""The text code without Triton: tensors on the wire, the way to the engine's server, ends and errors of an answer.

Bytes are compared with tritonclient's own functions; the server is ``bare_triton``, which speaks the protocol and does
what each prompt says (test_doubles holds it against the real one). End tokens: TensorRT-LLM leaves out the one that a
request names, and counts its stop words among the output (contract of the C++ backend).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from tritonclient.grpc import InferInput
from tritonclient.utils import deserialize_bytes_tensor

from bare_process import Bare, prompt, unused_port
from minitron.text.answers import TextResponses
from minitron.text.engine import Address, EngineCallError, EngineClient
from minitron.text.prompts import Prompt
from minitron.text.request import TextRequest
from minitron.text.tensors import DATATYPES, datatype, from_bytes, to_bytes

T = TypeVar("T")


@pytest.mark.parametrize("kind", [*DATATYPES, "BYTES"])
def test_tensors_are_the_bytes_that_tritonclient_sends(kind: str) -> None:
    if kind == "BYTES":
        array = np.array([[b"", "é日".encode(), b"\x00\xff"]], dtype=object)
    else:
        array = np.array([[0, 1, 3]]).astype(DATATYPES[kind])
    theirs = InferInput("x", list(array.shape), kind)
    theirs.set_data_from_numpy(array)
    assert datatype(array) == kind
    assert to_bytes(array) == theirs._get_content()
    back = from_bytes(kind, (1, 3), to_bytes(array))
    assert back.tolist() == array.tolist() and back.dtype == array.dtype
    if kind == "BYTES":
        assert deserialize_bytes_tensor(to_bytes(array)).tolist() == array.reshape(-1).tolist()


def test_the_server_s_address_comes_from_the_environment_then_the_parameters() -> None:
    parameters = {"grpc_url": "there:1", "grpc_ca": "/p/ca.pem", "grpc_api_key_file": "/p/key"}
    assert Address.of(parameters, {}) == Address("there:1", ca="/p/ca.pem", api_key_file="/p/key")
    environment = {"MINITRON_GRPC": "here:2", "MINITRON_GRPC_CA": "/e/ca.pem", "MINITRON_GRPC_AUTHORITY": "name"}
    wanted = Address("here:2", ca="/e/ca.pem", authority="name", api_key_file="/p/key")
    assert Address.of(parameters, environment) == wanted
    assert Address.of({}, {}).url == "127.0.0.1:8001"  # Triton's own port


def asked(
    url: str, work: Callable[[EngineClient], Coroutine[Any, Any, T]], *, name: str = "tensorrt_llm_bls", **address: str
) -> T:
    """Run ``work`` with a client of its own event loop; the bare process takes text under every name."""

    async def run() -> T:
        engine = EngineClient(name, Address(url, **address))
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def inputs(text: str, tokens: int = 5) -> dict[str, Any]:
    return {"text_input": np.array([[text.encode()]], dtype=object), "max_tokens": np.array([[tokens]], np.int32),
            "stream": np.array([[True]])}  # fmt: skip


async def collect(engine: EngineClient, text: str, tokens: int = 5) -> list[str]:
    batches = engine.batches(inputs(text, tokens), ["text_output"], "the-id")
    return [one["text_output"].item().decode() async for batch in batches for one in batch]


def test_an_answer_comes_whole(bare: Bare) -> None:
    assert asked(bare.url, lambda engine: collect(engine, prompt(tokens=5))) == [f" w{n}" for n in range(5)]


@pytest.mark.parametrize("after", [0, 3])
def test_an_error_is_an_error_whenever_it_comes(bare: Bare, after: int) -> None:
    with pytest.raises(EngineCallError, match="it broke"):
        asked(bare.url, lambda engine: collect(engine, prompt(tokens=5, error="it broke", error_after=after)))


def test_a_stream_that_ends_before_its_last_response_is_no_answer(bare: Bare) -> None:
    with pytest.raises(EngineCallError, match="ended the stream before its last response"):
        asked(bare.url, lambda engine: collect(engine, prompt(tokens=2, unfinished=True)))


def test_leaving_stops_the_request_and_cancels_nothing(start_bare: Callable[..., Bare]) -> None:
    server = start_bare()

    async def leave(engine: EngineClient) -> None:
        stream = engine.batches(inputs(prompt(tokens=10_000), 10_000), ["text_output"], "one")
        async with contextlib.aclosing(stream):
            async for _ in stream:
                break

    asked(server.url, leave)  # closing the client waits for the end of what was stopped
    assert server.events("stop", "one") and server.events("end", "one")
    assert not server.events("cancel")


def test_a_server_that_hangs_is_told_from_one_that_refuses(start_bare: Callable[..., Bare]) -> None:
    """Stopped, it takes connections and says nothing; gone, it refuses them."""
    server = start_bare()
    assert not asked(server.url, lambda engine: engine.is_silent(60))
    os.kill(server.process.pid, signal.SIGSTOP)
    assert asked(server.url, lambda engine: engine.is_silent(0.5))
    server.end()
    assert not asked(server.url, lambda engine: engine.is_silent(60))


def test_a_server_that_is_not_there_is_named_with_what_to_set() -> None:
    url = f"127.0.0.1:{unused_port()}"
    with pytest.raises(EngineCallError, match=rf"cannot be reached at {url} .*MINITRON_GRPC .*grpc_url"):
        asked(url, lambda engine: collect(engine, "x"))


@pytest.mark.parametrize("what", ["ca", "api_key_file"])
def test_a_file_that_cannot_be_read_fails_before_the_first_request(tmp_path: Path, what: str) -> None:
    missing = str(tmp_path / "missing.pem")
    with pytest.raises(ValueError, match=rf"{missing}.*cannot be read: No such file"):
        asked("127.0.0.1:1", lambda engine: collect(engine, "x"), **{what: missing})


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"ca": "garbage"}, "garbage holds no certificate in PEM"),
        ({"ca": "ca.key"}, r"ca\.key holds no certificate in PEM"),
        ({"ca": "ca.crt", "cert": "garbage", "key": "client.key"}, "garbage holds no certificate in PEM"),
        ({"ca": "ca.crt", "cert": "client.crt", "key": "garbage"}, r"garbage is not the plain private key of .*client"),
        ({"ca": "ca.crt", "cert": "client.crt", "key": "server.key"}, r"server\.key is not the plain private key of"),
        ({"ca": "ca.crt", "cert": "server.crt", "key": "locked.key"}, r"locked\.key is not the plain .*password"),
        ({"ca": "ca.crt", "cert": "client.crt"}, r"client\.crt needs its private key beside it"),
        ({"ca": "ca.crt", "key": "client.key"}, r"client\.key needs the certificate beside it"),
        ({"cert": "client.crt", "key": "client.key"}, r"client\.crt is for TLS, and the certificate of the server's"),
        ({"api_key_file": "empty"}, "empty holds no API key"),
        ({"api_key_file": "two"}, "two must hold one line"),
        ({"api_key_file": "garbage"}, "garbage cannot be read as an API key"),
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else_fails_before_the_first_request_too(
    tmp_path: Path, certificates: Path, files: dict[str, str], said: str
) -> None:
    """What each file of openssl's is, openssl says (``certificates``); gRPC itself would take all of them."""
    for name, content in (("garbage", b"\x00\xff"), ("empty", b"\n"), ("two", b"one-key\nanother-key\n")):
        (tmp_path / name).write_bytes(content)
    given = {
        field: str(certificates / file if (certificates / file).is_file() else tmp_path / file)
        for field, file in files.items()
    }
    with pytest.raises(ValueError, match=said):
        asked("127.0.0.1:1", lambda engine: collect(engine, "x"), **given)


def test_tls_that_does_not_fit_is_told_beside_the_address(start_bare: Callable[..., Bare], certificates: Path) -> None:
    """gRPC says of a client without TLS or a certificate that the socket closed, and of a wrong name that itself."""
    server = start_bare("--tls", str(certificates), "--mutual")
    pem = {"ca": str(certificates / "ca.crt"), "cert": str(certificates / "client.crt")}
    wrong_name = pem | {"key": str(certificates / "client.key"), "authority": "another.name"}
    for given in ({}, {"ca": pem["ca"]}, wrong_name):
        with pytest.raises(EngineCallError, match=r"cannot be reached .*grpc_url, .*TLS, MINITRON_GRPC_CA .*grpc_ca,"):
            asked(server.url, lambda engine: collect(engine, "x"), **given)


def test_mutual_tls_and_the_key_go_with_every_request(
    start_bare: Callable[..., Bare], certificates: Path, tmp_path: Path
) -> None:
    server = start_bare("--tls", str(certificates), "--mutual")
    (tmp_path / "key").write_text("a-key-of-sixteen-letters\n")
    pem = {name: str(certificates / file) for name, file in
           (("ca", "ca.crt"), ("cert", "client.crt"), ("key", "client.key"))}  # fmt: skip
    found = asked(
        server.url, lambda engine: collect(engine, prompt(tokens=2)), **pem, api_key_file=str(tmp_path / "key")
    )
    assert "".join(found) == " w0 w1"
    (noted,) = server.events("request")
    assert noted["metadata"]["triton-grpc-protocol-api-key"] == "a-key-of-sixteen-letters"


class Letters:
    """A tokenizer whose id n is the letter chr(97 + n)."""

    def decode(self, ids: Any) -> str:
        return "".join(chr(97 + token) for token in ids)

    def is_skipped(self, token: int) -> bool:
        return False

    def is_byte(self, token: int) -> bool:
        return False


def ends(*more: int) -> Prompt:
    none = np.zeros((1, 2, 0), np.int32)
    one = np.ones((1, 1), np.int32)
    return Prompt([[0]], more, one * 0, one, one * 9, one * 25, one, none, none, np.zeros((1, 0), np.float32), 32)


def sent(*ids: int) -> dict[str, Any]:
    return {
        "output_ids": np.array([[ids]], np.int32).reshape(1, 1, -1),
        "sequence_length": np.array([[len(ids)]], np.int32),
        "output_log_probs": -np.array([[ids]], np.float32).reshape(1, 1, -1),
        "num_output_tokens": np.array([[len(ids)]], np.int32),
    }  # fmt: skip


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("last", [(23,), (24,), (3, 24)])
def test_the_model_s_other_end_tokens_are_no_part_of_the_answer(streams: bool, last: tuple[int, ...]) -> None:
    request = TextRequest({}, 1, streams, echoes=False, sequences=1, stop_words=[[]])
    answers = TextResponses(Letters(), ends(23, 24), request)
    got = [one for part in ((1,), (2,), last) if (one := answers.feed(sent(*part))) is not None]
    got += answers.finish()
    rest = last[:-1]
    assert "".join(one["text_output"][0].decode() for one in got) == Letters().decode((1, 2, *rest))
    assert sum(int(one["num_output_tokens"].item()) for one in got) == 2 + len(rest)
    log_probs = [value for one in got for value in one["output_log_probs"].reshape(-1).tolist()]
    assert log_probs == [-1.0, -2.0, *(-float(token) for token in rest)]


def test_an_end_token_inside_an_answer_is_text() -> None:
    """A client's own end_id makes the model's ones ordinary: then there are no others."""
    request = TextRequest({}, 1, False, echoes=False, sequences=1, stop_words=[[]])
    answers = TextResponses(Letters(), ends(), request)
    answers.feed(sent(1, 23))
    assert [one["text_output"][0] for one in answers.finish()] == [b"bx"]


def tokens(ids: list[int], place: int = 0, **more: Any) -> dict[str, Any]:
    """A response of the engine with some tokens of the sequence ``place``."""
    response = {"output_ids": np.array([[ids]], np.int32), "sequence_length": np.array([[len(ids)]], np.int32),
                "output_log_probs": np.array([[[float(-one) for one in ids]]], np.float32),
                "sequence_index": np.array([[place]], np.int32)}  # fmt: skip
    return response | more


def streamed_from(
    batches: list[list[dict[str, Any]]], stop_words: list[str], sequences: int = 1
) -> list[dict[str, Any]]:
    """The responses of a stream whose engine's responses came together as ``batches``."""
    from conftest import SMALL_MODEL
    from minitron.text.prompts import PromptMaker
    from minitron.text.tokenizer import TextTokenizer

    tokenizer = TextTokenizer(str(SMALL_MODEL))
    arrays = {"text_input": np.array([[b"the sea"]], dtype=object), "max_tokens": np.array([[64]], np.int32),
              "stream": np.array([[True]]), "num_return_sequences": np.array([[sequences]], np.int32),
              "stop_words": np.array([[word.encode() for word in stop_words]], dtype=object)}  # fmt: skip
    request = TextRequest.read(arrays, excludes_input=True)
    limits = {"max_input_len": "64", "max_seq_len": "128", "vocab_size": "1024"}
    answers = TextResponses(tokenizer, PromptMaker(tokenizer, limits).of_request(arrays), request)
    sent = [dict(one) for batch in batches for one in answers.feed_all(batch)]
    return [*sent, *map(dict, answers.finish())]


def texts_of(sent: list[dict[str, Any]], place: int) -> tuple[str, list[float]]:
    mine = [one for one in sent if int(one["sequence_index"].item()) == place]
    values = [value for one in mine for value in one.get("output_log_probs", np.zeros(0)).reshape(-1).tolist()]
    return b"".join(one["text_output"].item() for one in mine).decode(), values


@pytest.mark.parametrize("stop_words", [[], ["\x00 never"], ["up", "all"]])
def test_tokens_that_waited_go_out_together_and_say_the_same(stop_words: list[str]) -> None:
    """Two sequences whose tokens came mixed: each one's text and log probs are those of tokens that came alone."""
    ids = {0: [391, 260, 300, 17, 20, 999, 431, 402], 1: [260, 391, 700, 701, 12, 5, 6, 7]}
    alone = [tokens([token], place) for pair in zip(*ids.values(), strict=True) for place, token in enumerate(pair)]
    one_by_one = streamed_from([[one] for one in alone], stop_words, sequences=2)
    together = streamed_from([alone[:3], alone[3:11], alone[11:]], stop_words, sequences=2)
    for place in ids:
        assert texts_of(together, place) == texts_of(one_by_one, place)
    assert (len(together) < len(one_by_one)) == (not stop_words)


def test_what_is_no_row_of_tokens_is_sent_as_it_came() -> None:
    """Logits of two steps are two responses; the order of a sequence is kept around them."""
    logits: dict[str, Any] = {"generation_logits": np.zeros((1, 1, 1, 4), np.float32)}
    sent = streamed_from([[tokens([391]), tokens([260], **logits), tokens([300], **logits), tokens([17])]], [])
    assert ["generation_logits" in one for one in sent][:4] == [False, True, True, False]
    assert texts_of(sent, 0)[1] == [-391.0, -260.0, -300.0, -17.0]
