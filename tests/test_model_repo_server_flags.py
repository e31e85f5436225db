"""``minitron serve DIR -- FLAGS``: Triton's own flags, held against those of the toolkit.

Flags, and that a prefix will do for a name (getopt_long(3)), are those of the bundled ``tritonserver``: it is asked
itself. Which flags the toolkit sets is read from what it prints.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from conftest import minitron, minitron_here
from minitron.errors import ServerError, UsageError
from minitron_triton.server import bundled, container, triton_flags
from minitron_triton.server.launch import Options, Ports, Served, new_mark

FREE = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
SECRET = "hunter2hunter2"


def dry_run(*words: str | Path) -> list[str]:
    code, out, err = minitron_here("serve", *words)
    assert code == 0, err
    return out.split()


def triton(*words: str) -> str:
    wheel = bundled.find()
    done = subprocess.run(
        [wheel.server, *words], env={"LD_LIBRARY_PATH": str(wheel.libraries)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def names() -> list[str]:
    """All flags of the bundled server, without their dashes."""
    found = re.findall(r"^  --([a-z0-9-]+)", triton("--help"), re.MULTILINE)
    assert len(found) > 80
    return found


@pytest.mark.parametrize("server", ["bundled", "container"])
@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--id=one"], ["--id=one"]),
        (["--id", "one"], ["--id=one"]),
        (["--http_thread_count", "3"], ["--http-thread-count=3"]),
        (["--grpc-max-connection-age=-1"], ["--grpc-max-connection-age=-1"]),
        (["--grpc-max-connection-age", "-1"], ["--grpc-max-connection-age=-1"]),
        (["--id="], ["--id="]),
        (["--id", "a=b"], ["--id=a=b"]),
        (["--a-flag-of-the-future"], ["--a-flag-of-the-future"]),
        (["--cache-config=local,size=1048576", "--metrics-config", "summary_latencies=true"],
         ["--cache-config=local,size=1048576", "--metrics-config=summary_latencies=true"]),
        (["--backend-config=python,stub-timeout-seconds=60", "--backend-config=python,shm-default-byte-size=1048576"],
         ["--backend-config=python,stub-timeout-seconds=60", "--backend-config=python,shm-default-byte-size=1048576"]),
        ([], []),
    ],
    ids=str,
)  # fmt: skip
def test_flags_are_handed_on_behind_ours(echo: Path, server: str, words: list[str], seen: list[str]) -> None:
    before = dry_run(echo, "--dry-run", "--server", server)
    after = dry_run(echo, "--server", server, "--dry-run", "--", *words)
    assert after[len(after) - len(seen) :] == seen
    assert len(after) == len(before) + len(seen)


def test_the_user_s_own_take_the_place_of_defaults(echo: Path) -> None:
    for name in triton_flags.DEFAULTS:
        words = dry_run(echo, "--dry-run", "--", f"--{name}", "77")
        assert [word for word in words if word.startswith(f"--{name}=")] == [f"--{name}=77"]
    words = dry_run(echo, "--dry-run", "--", "--pinned-memory-pool-byte-size=1")
    assert [word for word in words if "pinned" in word] == ["--pinned-memory-pool-byte-size=1"]


def test_what_the_toolkit_sets_is_refused_with_what_to_give(echo: Path, certificates: Path, tmp_path: Path) -> None:
    """Every flag that it prints, but for the few that may be replaced."""
    (tmp_path / "key").write_text("a-key-of-sixteen-letters\n")
    (tmp_path / "key").chmod(0o600)
    given = ("--tls-cert", certificates / "server.crt", "--tls-key", certificates / "server.key", "--tls-ca",
             certificates / "ca.crt", "--loopback-cert", certificates / "client.crt", "--loopback-key",
             certificates / "client.key", "--api-key-file", tmp_path / "key")  # fmt: skip
    printed = dry_run(echo, *given, "--dry-run")[1:]
    free = {*triton_flags.DEFAULTS, "pinned-memory-pool-byte-size", "allow-gpu-metrics", "backend-config"}
    ours = {word.removeprefix("--").partition("=")[0] for word in printed if word.startswith("--")} - free
    assert len(ours) > 15
    for name in ours:
        for words in ((f"--{name}={SECRET}",), (f"--{name}", SECRET), (f"--{name.replace('-', '_')}={SECRET}",)):
            code, _, err = minitron_here("serve", echo, "--", *words)
            assert code == UsageError.exit_code, name
            assert f"--{name} behind '--' cannot be had, minitron has its own: " in err and err.count("\n") == 1
            assert SECRET not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grpc-port=9000"], "give --grpc-port"),
        (["--http-address", "0.0.0.0"], "give --host"),
        (["--exit-timeout-secs=1"], "give --exit-timeout"),
        (["--log-verbose=1"], "give --verbose"),
        (["--log-file=/tmp/log"], "the supervisor reads the server's log"),
        (["--grpc-server-cert=a.pem"], "give --tls-cert"),
        (["--grpc-use-ssl", "true"], "give --tls-cert, --tls-key and --tls-ca"),
        ([f"--grpc-restricted-protocol=inference:key={SECRET}"], "give --api-key-file"),
        (["--model-store=/models"], "give the folder as DIR"),
        (["--model-control-mode=poll"], "minitron render"),
        (["--allow-http=false"], "the supervisor asks its server over HTTP"),
        (["--allow-vertex-ai=true"], "without the API key"),
        (["--backend-config=python,shm-region-prefix-name=x"], "names of its own"),
        (["--help"], "starts no server"),
        (["--id=1", "--id", "2"], "--id stands behind '--' twice"),
        (["--cache-config=local,size=1", "--cache-config", "local,size=2"], "--cache-config stands behind '--' twice"),
        (["--grpc-po=9000"], "written out: tritonserver may take it for --grpc-port"),
        (["--log"], "written out: tritonserver may take it for --log-"),
        (["id=1"], "at the beginning is a word that belongs to none"),
        ([SECRET], "at the beginning is a word that belongs to none"),
        (["-h"], "at the beginning is a word that belongs to none"),
        (["--id=1", SECRET], "behind --id is a word that belongs to none"),
        (["--id", "1", SECRET], "behind --id is a word that belongs to none"),
        (["--"], "at the beginning is a word that belongs to none"),
    ],
    ids=str,
)
def test_what_cannot_be_handed_on(echo: Path, words: list[str], said: str) -> None:
    code, out, err = minitron_here("serve", echo, "--dry-run", "--", *words)
    assert (code, out, err.count("\n")) == (UsageError.exit_code, "", 1), err
    assert said in err and SECRET not in err


@pytest.mark.server
def test_the_server_knows_the_flags_that_we_know(names: list[str]) -> None:
    ours = {flag.partition("=")[0] for flag in triton_flags._OURS}
    assert ours | {*triton_flags.DEFAULTS, *triton_flags._REPEATABLE} <= {*names}


@pytest.mark.server
def test_a_prefix_that_the_server_takes_for_one_of_ours_is_refused(names: list[str]) -> None:
    """As it says itself: an unknown option is one that is no prefix either."""
    for name in ("model-repository", "grpc-port", "http-restricted-api", "log-file", "backend-directory"):
        for end in range(len(name) - 3, len(name)):
            if name[:end] in names:
                continue
            said = triton(f"--{name[:end]}=/nowhere", "--no-such-flag").split("\n")[:2]
            assert not [line for line in said if f"unrecognized option '--{name[:end]}=" in line]
            with pytest.raises(UsageError, match=r"written out|has its own"):
                triton_flags.read([f"--{name[:end]}=/nowhere"])


def test_secrets_are_shown_nowhere(echo: Path) -> None:
    words = ["--cache-config", f"redis,password={SECRET}", "--cache-config=redis,host=there"]
    shown = dry_run(echo, "--dry-run", "--", *words)
    assert "'--cache-config=redis,password=***'" in shown and "--cache-config=redis,host=there" in shown
    options = Options(triton_flags=triton_flags.read(words))
    assert SECRET not in repr(options)
    for one in (bundled, container):
        launch = one.launch(Served.read(echo), options, Ports(), echo, new_mark())
        assert f"--cache-config=redis,password={SECRET}" in launch.argv
        assert SECRET not in " ".join(launch.shown()) and SECRET not in repr(launch)


@pytest.mark.server
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([f"--no-such-flag={SECRET}"], "unrecognized option '--no-such-flag' "),
        (["--id"], "option '--id' requires an argument "),
        ([f"--grpc-keepalive-time={SECRET}"], "a bad value for --grpc-keepalive-time "),
    ],
)
def test_what_the_server_itself_refuses_is_said_in_its_words(
    echo: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    done = minitron("serve", echo, *FREE, "--state", tmp_path / "state", "--", *words, check=False)
    assert done.returncode == ServerError.exit_code
    assert said in done.stderr and SECRET not in done.stderr


@pytest.mark.server
def test_a_flag_reaches_the_server(echo: Path, serve: object) -> None:
    """Its id is what its metadata calls it."""
    from minitron_client.client import Client

    one = serve(echo, "--", "--id", "of another name")  # type: ignore[operator]
    with Client(one.url) as client:
        assert client.metadata()["name"] == "of another name"


def test_other_commands_keep_the_meaning_of_two_dashes() -> None:
    code, _, err = minitron_here("generate", "--url", "127.0.0.1:1", "--deadline", "5", "--", "-5 degrees")
    assert code == 10, err  # the prompt was taken, and nobody is there
