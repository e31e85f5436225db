"""The environment does not answer in place of the server: proxies (grpc#29718, grpc#9989, llama_index#13526), and more.

The proxy here is a real listener that says 502 to everybody and notes who came, so "directly" is what it did not hear.
Which variable leads gRPC and urllib through a proxy is theirs to say: ``test_the_rules_are_those_of_...`` asks the
libraries themselves, on an address that is only called not loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import echo_repository
from bare_process import Bare, prompt, unused_port
from conftest import SMALL_MODEL, minitron
from gateway_process import Gateway
from hub_server import hub
from minitron.errors import MachineError, NotReady
from minitron.prometheus import Metrics
from minitron.text import proxy
from minitron_build.engines.tensorrt import process
from minitron_cli import doctor
from minitron_client.client import AsyncClient, Client
from minitron_triton.server import container
from minitron_triton.server.launch import Options, Ports, Served
from minitron_triton.server.openai import OpenAi
from serving import server as serving
from supervisor import Supervisor, environment, tritonserver

pytestmark = pytest.mark.slow

SECRET = "hunter2hunter2"


class Trap(threading.Thread):
    """A proxy on this machine that refuses everything; ``asked``: the first line of each request."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.asked: list[str] = []
        self.start()

    @property
    def url(self) -> str:
        return f"http://somebody:{SECRET}@127.0.0.1:{self._listening.getsockname()[1]}"

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                with connection, contextlib.suppress(OSError):
                    self.asked.append(connection.recv(4096).decode("latin-1").split("\r\n")[0])
                    connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def trap(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trap]:
    """A proxy, and an environment that names none yet."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    one = Trap()
    yield one
    one.close()


VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture
def surrounded(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> Trap:
    """An environment in which every variable names the proxy."""
    for name in VARIABLES:
        monkeypatch.setenv(name, trap.url)
    return trap


# ---- who is loopback (RFC 1122, RFC 4291, RFC 6761, and Linux for 0.0.0.0), and who is excepted


@pytest.mark.parametrize(
    ("host", "right"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
        ("LOCALHOST.", True), ("a.localhost", True), ("::ffff:127.0.0.1", True), ("127.1", True), ("0x7f000001", True),
        ("0.0.0.0", True), ("::", True), ("128.0.0.1", False), ("localhost.example", False), ("10.0.0.1", False),
        ("::2", False), ("server", False), ("", False), ("127.0.0.1.example", False), ("fe80::1%eth0", False),
        ("notlocalhost", False),
    ],
)  # fmt: skip
def test_loopback_is_known_in_all_its_forms(host: str, right: bool) -> None:
    assert proxy.is_loopback(host) is right


@pytest.mark.parametrize(
    ("url", "excepted", "direct"),
    [
        ("server:8001", "server", True), ("server:8001", "other,server", True), ("server:8001", "other server", True),
        ("server:8001", "server:8001", True), ("server:8002", "server:8001", False), ("server:8001", "*", True),
        ("a.example.org:1", "example.org", True), ("a.example.org:1", ".example.org", True),
        ("a.example.org:1", "*.example.org", True), ("an-example.org:1", "example.org", False),
        ("A.Example.ORG:1", "example.org", True), ("10.1.2.3:1", "10.0.0.0/8", True),
        ("11.1.2.3:1", "10.0.0.0/8", False), ("10.1.2.3:1", "10.1.2.3", True),
        ("[fd00::7]:1", "fd00::/8", True), ("server:8001", "", False),
        ("server:8001", " , ,", False), ("ipv4:10.1.2.3:1", "10.1.2.3", True), ("dns:server:1", "server", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY", "no_grpc_proxy"])
def test_exceptions_are_kept_as_curl_urllib_or_grpc_would(url: str, excepted: str, direct: bool, name: str) -> None:
    surroundings = {"http_proxy": "http://proxy:3128", name: excepted}
    assert (proxy.of_grpc(url, surroundings) is None) is direct
    assert (proxy.of_http(url, surroundings) is None) is direct


#: Sets of variables, each with the trap or with something else in its place.
SETS: tuple[dict[str, str], ...] = (
    *({name: "trap"} for name in VARIABLES),
    {"grpc_proxy": "", "http_proxy": "trap"}, {"https_proxy": "", "http_proxy": "trap"}, {"http_proxy": ""},
    {"http_proxy": "", "HTTP_PROXY": "trap"}, {"grpc_proxy": "elsewhere", "https_proxy": "trap"},
    {"https_proxy": "elsewhere", "http_proxy": "trap"}, {"http_proxy": "bare trap"}, {"http_proxy": "https trap"},
    {"http_proxy": "socks trap"}, {"http_proxy": "trap", "REQUEST_METHOD": "GET"},
    {"HTTP_PROXY": "trap", "REQUEST_METHOD": "GET"},
)  # fmt: skip


def set_up(values: dict[str, str], trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "is_loopback", lambda host: False)
    host = trap.url.partition("@")[2]
    meant = {"trap": f"http://{host}", "bare trap": host, "https trap": f"https://{host}", "socks trap": f"socks5://{host}",
             "elsewhere": f"http://127.0.0.1:{unused_port()}"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, meant.get(value, value))


@pytest.mark.parametrize("values", SETS, ids=str)
def test_the_rules_are_those_of_grpc(values: dict[str, str], trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(values, trap, monkeypatch)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as deaf:  # nobody, but no refusal either
        url = f"127.0.0.1:{deaf.getsockname()[1]}"
        said = proxy.of_grpc(url)
        with (
            grpc.insecure_channel(url, [("grpc.use_local_subchannel_pool", 1)]) as channel,
            pytest.raises(grpc.RpcError),
        ):
            channel.unary_unary("/a/b")(b"", timeout=1)
    expected = values.get(said or "")
    assert bool(trap.asked) is (expected == "trap"), f"we say {said}"
    if "elsewhere" in values.values():
        assert expected == "elsewhere"


# Of the other two urllib asks no proxy: it takes the first for HOST:PORT without a scheme, and has no part for SOCKS.
@pytest.mark.parametrize("values", [one for one in SETS if not {"bare trap", "socks trap"} & {*one.values()}], ids=str)
def test_the_rules_are_those_of_urllib(values: dict[str, str], trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(values, trap, monkeypatch)
    url = f"127.0.0.1:{unused_port()}"
    said = proxy.of_http(url)
    with pytest.raises(OSError):
        urllib.request.build_opener().open(f"http://{url}/", timeout=10)
    assert bool(trap.asked) is (values.get(said or "") in ("trap", "https trap")), f"we say {said}"


# ---- loopback goes directly


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_clients_go_directly(surrounded: Trap, start_bare: Callable[..., Bare], host: str) -> None:
    url = f"{host}:{start_bare().port}"
    with Client(url, deadline_s=60) as client:
        assert client.generate(prompt(tokens=2), max_tokens=2).text == " w0 w1"

    async def ask() -> str:
        async with AsyncClient(url, deadline_s=60) as client:
            return (await client.generate(prompt(tokens=2), max_tokens=2)).text

    assert asyncio.run(ask()) == " w0 w1"
    assert minitron("generate", prompt(tokens=2), "--max-tokens", "2", "--url", url).stdout == " w0 w1\n"
    assert not surrounded.asked


def test_a_gateway_goes_directly(surrounded: Trap, start_bare: Callable[..., Bare]) -> None:
    gateway = Gateway("--upstream", start_bare("--tokenizer", str(SMALL_MODEL)).url)
    assert "it broke" in gateway.refusal(prompt(error="it broke"))[1]  # the server's own words
    done = minitron("generate", prompt(tokens=2), "--max-tokens", "2", "--url", gateway.document["url"])
    assert done.stderr.startswith("2 tokens")
    assert gateway.end()[0] == 0
    assert not surrounded.asked


def test_an_openai_api_elsewhere_is_asked_through_the_proxy_which_a_failure_names(surrounded: Trap) -> None:
    done = minitron("generate", "x", "--url", "http://server.example:8080/v1", check=False)
    assert surrounded.asked and "server.example:8080" in surrounded.asked[0]
    assert done.returncode == 9 and "HTTP 502" in done.stderr and SECRET not in done.stderr
    assert "http_proxy in the environment sends this to a proxy" in done.stderr


def test_a_mirror_of_hugging_face_on_this_machine_is_asked_directly(
    surrounded: Trap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")  # for which its HTTP library has no part
    with hub(SMALL_MODEL, "some/model") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        minitron("convert", "some/model", "--output", tmp_path / "out", "--precision", "float16")
    assert not surrounded.asked


@pytest.mark.server
def test_a_server_its_text_model_its_gateway_and_its_end_go_directly(
    surrounded: Trap, small_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    """From the first question (is it ready?) to the last (unload): no proxy hears of any."""
    repository = small_repository("bfloat16")
    with serving(repository, "--openai", "0", "--state", str(tmp_path)) as document:
        urls = document["urls"]
        told = minitron(
            "generate", "In the beginning", "--max-tokens", "4", "--temperature", "0", "--url", urls["grpc"]
        )
        assert told.stdout.strip()
        assert minitron("audit", repository, "--state", tmp_path).returncode == 0
        assert Metrics.read(urls["metrics"]).sum("nv_inference_request_success", model="tensorrt_llm")
        body = b'{"model": "minitron", "prompt": "In the beginning", "max_tokens": 4}'
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        asked = urllib.request.Request(
            f"http://{urls['openai']}/v1/completions", body, {"Content-Type": "application/json"}
        )
        assert opener.open(asked, timeout=60).status == 200
        minitron("stop", repository, "--state", tmp_path)
    assert document["process"].wait(60) == 0
    assert not surrounded.asked


# ---- what is not here goes as the environment has it, and the message says so

ELSEWHERE = "192.0.2.7:8001"  # TEST-NET-1 (RFC 5737): nobody has it


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_server_that_a_proxy_hides_is_named_with_the_variable(
    name: str, trap: Trap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, trap.url)
    done = minitron("generate", "hi", "--url", ELSEWHERE, check=False)
    assert done.returncode == NotReady.exit_code
    assert f"; {name} in the environment sends this to a proxy: unset it, or put 192.0.2.7 into no_proxy" in done.stderr
    assert SECRET not in done.stderr
    assert trap.asked[0] == f"CONNECT {ELSEWHERE} HTTP/1.1"


def test_metrics_that_a_proxy_hides_are_named_with_the_variable(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", trap.url)
    with pytest.raises(NotReady, match=r"502.*--metrics-url; HTTP_PROXY in .*put 192\.0\.2\.7 into no_proxy") as raised:
        Metrics.read(ELSEWHERE)
    assert SECRET not in str(raised.value)
    assert trap.asked == [f"GET http://{ELSEWHERE}/metrics HTTP/1.1"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("https_proxy", "trap"), ("ALL_PROXY", "trap"), ("all_proxy", f"socks5://somebody:{SECRET}@127.0.0.1:9"),
     ("https_proxy", f"nonsense://somebody:{SECRET}@127.0.0.1:9")],
)  # fmt: skip
def test_a_model_that_a_proxy_hides_is_named_with_the_variable(
    name: str, value: str, trap: Trap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, trap.url if value == "trap" else value)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    done = minitron("convert", "some/model", "--output", tmp_path / "out", "--precision", "float16", check=False)
    assert done.returncode == 3
    assert f"; {name} in the environment sends this to a proxy: unset it, or put hub.example" in done.stderr
    assert SECRET not in done.stderr


def test_without_a_proxy_no_message_names_one(trap: Trap) -> None:
    url = f"127.0.0.1:{unused_port()}"
    assert "proxy" not in minitron("generate", "hi", "--url", url, check=False).stderr


# ---- other things that an environment may say of another server


@pytest.mark.server
def test_what_the_environment_says_of_other_servers_reaches_none_of_ours(
    echo: Path, serve: Callable[..., Supervisor]
) -> None:
    """Variables of a server that calls itself, of Vertex AI, and of Triton's tests (``strings tritonserver``)."""
    foreign = {
        "MINITRON_GRPC": "127.0.0.1:1", "MINITRON_GRPC_CA": "/nowhere/ca.pem", "AIP_MODE": "PREDICTION",
        "AIP_HTTP_PORT": "1", "TRITON_SERVER_ESCAPE_LOG_MESSAGES": "0", "TRITONSERVER_DELAY_GRPC_COMPLETE": "60",
    }  # fmt: skip
    one = serve(echo, **foreign)
    seen = environment(tritonserver(one.mark))
    assert seen["MINITRON_GRPC"] == one.url
    assert not (foreign.keys() - {"MINITRON_GRPC"}) & seen.keys()


def test_counters_of_another_program_are_none_of_the_gateway_s(
    start_bare: Callable[..., Bare], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PROMETHEUS_MULTIPROC_DIR, as under gunicorn."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    code = "from prometheus_client import Counter; Counter('of_another_program', 'it').inc()"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(tmp_path.glob("*.db"))
    gateway = Gateway("--upstream", start_bare("--tokenizer", str(SMALL_MODEL)).url)
    page: Any = gateway.get("/metrics")[1]
    assert b"minitron_gateway_streams" in page and b"of_another_program" not in page
    assert gateway.end()[0] == 0


def test_a_gateway_beside_a_server_without_tls_speaks_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a shell may still say where the certificate of another server is."""
    monkeypatch.setenv("MINITRON_GRPC_CA", "/nowhere/ca.pem")
    folder = echo_repository.write(tmp_path / "echo", front="tensorrt_llm_bls")
    beside = OpenAi(Served.read(folder), Options(), Ports(), 0, tmp_path / "log")
    assert "MINITRON_GRPC_CA" not in beside._environment
    assert beside._environment["MINITRON_GRPC"] == "127.0.0.1:8001"


@pytest.mark.parametrize(
    ("value", "here"),
    [
        ("", True), ("unix:///var/run/docker.sock", True), ("unix:///run/user/1000/docker.sock", True),
        ("tcp://127.0.0.1:2375", True), ("tcp://localhost:2375", True), ("tcp://[::1]:2375", True), ("fd://", True),
        ("tcp://10.0.0.7:2376", False), ("ssh://somebody@builder", False), ("tcp://builder:2375", False),
    ],
)  # fmt: skip
def test_a_docker_of_another_machine_is_refused_by_name(
    value: str, here: bool, doubles: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Forms: docker's documentation of DOCKER_HOST."""
    monkeypatch.setenv("DOCKER_HOST", value)
    served = Served.read(echo_repository.write(tmp_path / "echo"))
    if here:
        container.check_machine(served)
        return
    with pytest.raises(MachineError, match="DOCKER_HOST in the environment names another machine"):
        container.check_machine(served)
    found = [check for check in doctor._container() if check.subject == "docker"]
    assert [(check.level, check.message) for check in found] == [("FAIL", "on another machine")]
    with pytest.raises(MachineError, match="DOCKER_HOST"):
        process.run(["docker", "run"], tmp_path / "log", cwd=tmp_path)
