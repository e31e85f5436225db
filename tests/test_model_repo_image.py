"""What the models around a TensorRT engine need of the image that serves them: named, looked for, and brought.

The image is played by a Python without site-packages that is given some of ours; docker by ``doubles/docker.py``.
Requirements are those of pyproject.toml, what a Dockerfile may hold is Docker's reference (FROM, RUN).
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import echo_repository
import hand_made
from conftest import ROOT, minitron
from minitron import recipe
from minitron.errors import InputError, UsageError
from minitron.text import packages
from minitron_build.plan import engine_plan, model
from minitron_cli.doctor import FAIL, OK, WARN, Requirement, diagnose
from minitron_triton.repository import kubernetes
from minitron_triton.repository.options import RepositoryOptions, from_recipe
from minitron_triton.repository.render import render
from minitron_triton.server.launch import Served
from supervisor import Supervisor
from test_core_extras import requirements

PINNED = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
DERIVED = "registry.example:5000/team/triton-text:1"
GRPC = "tritonclient[grpc]>=2.50"


def test_the_packages_are_the_project_s_own_requirements() -> None:
    assert set(packages.PACKAGES) <= requirements("dependencies")


def test_what_the_models_import_is_what_is_looked_for() -> None:
    """Of the text code and its models; transformers is imported for chat templates, which they have not."""
    models = ROOT / "model_repo" / "minitron_triton" / "models"
    sources = [*(ROOT / "core" / "minitron" / "text").glob("*.py"), *(models / "shared").glob("*.py")]
    sources += [models / name / "model.py" for name in ("preprocessing", "postprocessing", "tensorrt_llm_bls")]
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    beside = {"minitron", "reply", "triton_config", "triton_python_backend_utils"}
    known = {module for modules in packages.PACKAGES.values() for module in modules}
    assert found - set(sys.stdlib_module_names) - beside == known - {"google.protobuf"} | {"transformers"}


# --- the load of a model ----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_repository(tmp_path: Path) -> Path:
    render(hand_made.engine_folder(tmp_path / "engine", cpu=False), tmp_path / "gpu", RepositoryOptions())
    return tmp_path / "gpu"


def image_of(folder: Path, *modules: str) -> Path:
    """The site-packages of an image that has these of ours, and Triton's own module."""
    folder.mkdir()
    (folder / "triton_python_backend_utils.py").write_text("TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1\n")
    for module in modules:
        spec = importlib.util.find_spec(module)
        assert spec and spec.origin
        package = Path(spec.origin).parent
        (folder / module).symlink_to(package)
        if (libraries := package.parent / f"{module}.libs").is_dir():
            (folder / libraries.name).symlink_to(libraries)
    return folder


def load(model: Path, image: Path) -> str:
    """The last line of what Python says that loads a model as Triton does."""
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('model', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "module.TritonPythonModel().initialize({'model_config': '{\"parameters\": {}}', 'model_name': 'x'})\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code, model], capture_output=True, text=True, check=False,
                          env={"PYTHONPATH": str(image), "PATH": os.environ["PATH"]})  # fmt: skip
    return done.stderr.strip().rpartition("\n")[2]


def test_the_text_model_s_load_says_which_package_is_missing_and_what_to_do(
    gpu_repository: Path, tmp_path: Path
) -> None:
    said = load(gpu_repository / "tensorrt_llm_bls" / "1" / "model.py", image_of(tmp_path / "i", "numpy", "tokenizers"))
    assert said.startswith(f"ImportError: {GRPC} is not installed where this model runs")
    assert "minitron serve DIR --dockerfile" in said and "--image NAME:TAG" in said


@pytest.mark.parametrize("model", ["preprocessing", "postprocessing"])
def test_the_ensemble_s_models_say_it_at_the_load_too(gpu_repository: Path, tmp_path: Path, model: str) -> None:
    said = load(gpu_repository / model / "1" / "model.py", image_of(tmp_path / "i", "numpy"))
    assert said.startswith("ImportError: tokenizers>=0.20 is not installed where this model runs")
    assert not load(gpu_repository / model / "1" / "model.py", image_of(tmp_path / "j", "numpy", "tokenizers"))


@pytest.mark.server
@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("", "nowhere>=1 is not installed where this model runs"),
        ("grpc_ca", "holds no certificate in PEM"),
        ("grpc_cert", "is for TLS, and the certificate of the server's authority is not given"),
        ("grpc_api_key_file", "holds no API key"),
    ],
)
def test_triton_hands_on_why_the_text_model_does_not_load(
    tmp_path: Path, serve: Callable[..., Supervisor], parameter: str, said: str
) -> None:
    """In the real server: a package that there is not, and files that hold nothing."""
    text_model = hand_made.echo_repository(tmp_path) / "tensorrt_llm_bls"
    (tmp_path / "nothing").touch()
    if parameter:
        value = f'value: {{ string_value: "{tmp_path}/nothing" }}'
        with open(text_model / "config.pbtxt", "a", encoding="utf-8") as config:
            config.write(f'parameters {{ key: "{parameter}" {value} }}\n')
    else:
        looked_for = text_model / "1" / "minitron" / "text" / "packages.py"
        source = looked_for.read_text(encoding="utf-8")
        looked_for.write_text(source.replace("PACKAGES = {", 'PACKAGES = {"nowhere>=1": ("nowhere",),'), "utf-8")
    code, told = serve(text_model.parent, ready=False).end(timeout_s=300)
    (line,) = [line for line in told.splitlines() if line.startswith("minitron: error:")]
    assert code == 7 and said in line and "Traceback" not in line


# --- the derived image ------------------------------------------------------------------------------------------------


def test_serve_prints_a_dockerfile_of_two_lines(gpu_repository: Path) -> None:
    first, second = minitron("serve", gpu_repository, "--dockerfile").stdout.splitlines()
    assert first == f"FROM {PINNED}"
    run, *words = shlex.split(second)
    assert run == "RUN" and words[1:3] == ["pip", "install"]
    assert set(words[4:]) == {"numpy>=1.24", "tokenizers>=0.20", GRPC}


def image_in(words: str) -> str:
    """The image in a line of docker run: what stands before the command."""
    split = shlex.split(words)
    return split[split.index("tritonserver") - 1]


def test_serve_takes_a_derived_image(gpu_repository: Path, tmp_path: Path) -> None:
    assert image_in(minitron("serve", gpu_repository, "--dry-run").stdout) == PINNED
    assert image_in(minitron("serve", gpu_repository, "--dry-run", "--image", DERIVED).stdout) == DERIVED
    (tmp_path / "mine.yaml").write_text(f"container: {{image: '{DERIVED}'}}\n")
    by_recipe = minitron("serve", gpu_repository, "--dry-run", "--recipe", tmp_path / "mine.yaml")
    assert image_in(by_recipe.stdout) == DERIVED


def test_an_image_of_no_container_is_refused(tmp_path: Path) -> None:
    repository = echo_repository.write(tmp_path / "cpu")
    done = minitron("serve", repository, "--dry-run", "--image", DERIVED, check=False)
    assert done.returncode == UsageError.exit_code and "is served without one" in done.stderr
    done = minitron("serve", repository, "--dockerfile", check=False)
    assert done.returncode == UsageError.exit_code and "has no TensorRT engine" in done.stderr


@pytest.mark.parametrize("name", ["triton", "triton:", "-v:1", "two words:1", "localhost:5000/triton"])
def test_an_image_s_name_is_whole(name: str) -> None:
    with pytest.raises((UsageError, InputError), match=r"container\.image: .* is no NAME:TAG"):
        recipe.load(None, {}, {"container.image": f"'{name}'"})


def test_the_compose_file_and_the_chart_s_values_have_it_too(tmp_path: Path) -> None:
    wanted = recipe.load("a100-int8", {}, {"container.image": DERIVED}).recipe
    render(hand_made.engine_folder(tmp_path / "engine", cpu=False), tmp_path / "gpu", from_recipe(wanted))
    (service,) = yaml.safe_load((tmp_path / "gpu" / "docker-compose.yaml").read_text())["services"].values()
    assert service["image"] == DERIVED
    plan = engine_plan.plan(wanted, model.look_up(wanted.model)).document()
    values = kubernetes.values(wanted, plan, Served.read(tmp_path / "gpu"), key="0" * 64)
    assert "{repository}:{tag}".format_map(values["images"]["triton"]) == DERIVED
    # The versions are those of the image that it derives from, and another one may be derived.
    assert minitron("serve", tmp_path / "gpu", "--dockerfile").stdout.startswith(f"FROM {PINNED}\n")


# --- doctor -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with docker, the double, and with a Python of the image that has numpy and tokenizers alone."""
    folder = tmp_path / "bin"
    folder.mkdir()
    image = image_of(tmp_path / "image", "numpy", "tokenizers")
    for name, script in (
        ("docker", f'exec {sys.executable} {ROOT}/tests/doubles/docker.py "$@"'),
        ("python3", f"echo '== Triton Inference Server =='; PYTHONPATH={image} exec {sys.executable} -S \"$@\""),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return folder


def packages_of_image(**flags: object) -> Requirement:
    found = diagnose(recipe.load("a100-int8", {}, flags).recipe, Path.cwd())
    return next(check for check in found.checks if check.subject == "image packages")


def test_doctor_asks_the_image_for_its_packages(programs: Path) -> None:
    found = packages_of_image()
    assert (found.level, found.message) == (FAIL, f"{PINNED} lacks {GRPC}")
    assert "minitron serve DIR --dockerfile" in found.remedy and "--image" in found.remedy
    (programs / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    found = packages_of_image(**{"container.image": DERIVED})
    assert found.level == OK and GRPC in found.message and DERIVED in found.message


def test_doctor_says_where_no_image_was_asked(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_DOUBLE_ABSENT", PINNED)
    found = packages_of_image()
    assert found.level == WARN and "is not on this machine" in found.message and found.remedy == f"docker pull {PINNED}"
    monkeypatch.delenv("DOCKER_DOUBLE_ABSENT")
    (programs / "python3").write_text("#!/bin/sh\nexit 127\n")
    found = packages_of_image()
    assert found.level == WARN and "did not answer" in found.message
    monkeypatch.setenv("PATH", "")
    found = packages_of_image()
    assert found.level == WARN and found.message.startswith("not looked at")
