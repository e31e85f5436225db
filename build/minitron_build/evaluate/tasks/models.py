"""What tasks are asked of, each as lm-eval's model: a CPU engine, a model that transformers runs, or a server."""

from __future__ import annotations

import importlib.util
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import MissingDependency, ModelError, NotReady, UsageError
from minitron.version import VERSION
from minitron_build.evaluate.candidate import digest, prepare

#: Requests on their way to a server at once.
_CONCURRENT = 8
_SECONDS = 600


@dataclass(frozen=True)
class Opened:
    """lm-eval's ``model``, what is known about it, and ``of``: a digest of all that its answers depend on, or empty."""

    model: Any
    about: dict[str, Any]
    of: str = ""


def open_engine(name: str, scratch: Path, *, noted: bool) -> Opened:
    """A model, checkpoint or CPU engine, run by the CPU engine; ``noted``: its answers will be kept, and need a digest.

    Raises what preparing it raises, EngineError.
    """
    from minitron.machine.openvino import VERSION as ENGINE
    from minitron_build.evaluate.tasks.engine_model import EngineModel

    subject = prepare(name, scratch)
    of = f"{digest(name)} openvino {ENGINE} toolkit {VERSION}" if noted else ""
    about = {"name": name, "run_by": "CPU engine", "execution": subject.execution} | subject.description()
    return Opened(EngineModel(subject.engine, subject.max_tokens), about, of)


def open_transformers(name: str, dtype: str, *, noted: bool) -> Opened:
    """A Hugging Face folder, run by transformers as ``lm_eval --model hf`` does.

    Raises ModelError, MissingDependency.
    """
    for package in ("torch", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(f"--transformers needs the package {package}: pip install 'lm-eval[hf]==0.4.13'")
    from lm_eval.models.huggingface import HFLM

    if not (Path(name) / "config.json").is_file():
        raise ModelError(f"--transformers runs Hugging Face folders, and {name} is none")
    model = HFLM(pretrained=name, dtype=dtype, device="cpu", batch_size=1)
    import transformers

    of = f"{digest(name)} transformers {transformers.__version__} {dtype}" if noted else ""
    return Opened(model, {"name": name, "run_by": f"transformers, {dtype}", "kind": "model"}, of)


def open_server(name: str, url: str, tokenizer: Path | None) -> Opened:
    """A server with OpenAI's completions at ``url``, which ends with /v1, and the tokenizer of its model.

    ``name``: what the user calls it. Raises UsageError, NotReady.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url {url} is neither an OpenAI endpoint (http://HOST:PORT/v1) nor grpc://HOST:PORT")
    if tokenizer is None:
        raise UsageError("--url needs --tokenizer DIR, the folder of the served model's tokenizer")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    served = _served(url)
    settings = {"max_length": served["max_model_len"]} if served.get("max_model_len") else {}
    model = LocalCompletionsAPI(
        base_url=f"{url.rstrip('/')}/completions", model=served["id"], tokenizer=str(tokenizer), timeout=_SECONDS,
        tokenizer_backend="huggingface", num_concurrent=_CONCURRENT, **settings,
    )  # fmt: skip
    about = {"name": name, "run_by": f"server, model {served['id']}", "kind": "server"}
    return Opened(model, about, f"{name} {served['id']}")


def _served(url: str) -> dict[str, Any]:
    """What a server says of its first model."""
    try:
        key = os.environ.get("OPENAI_API_KEY")  # where lm-eval has it from
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(f"{url.rstrip('/')}/models", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            models = json.load(answer)["data"]
        found: dict[str, Any] = models[0]
        return found | {"id": str(found["id"])}
    except (urllib.error.URLError, OSError) as error:
        raise NotReady(f"{url}/models does not answer ({error}); is --url the address that ends with /v1?") from error
    except (ValueError, LookupError, TypeError) as error:
        raise NotReady(f"{url}/models does not list models as OpenAI's API does") from error
