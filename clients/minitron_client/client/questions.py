"""What can be asked about a server and its models: each question with its call and how its answer is read."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2 as pb

from minitron.errors import NotReady
from minitron_client.client import dialect
from minitron_client.client.dialect import FRONTS, ServedModel
from minitron_client.client.local_text import LocalText


@dataclass(frozen=True)
class Question:
    """A call of ``inference.GRPCInferenceService`` and what its answer means."""

    rpc: str
    message: Any
    read: Callable[[Any], Any]


def _plain(message: Any) -> dict[str, Any]:
    """A protobuf message as JSON values, under its own field names (64-bit numbers become strings)."""
    return dict(MessageToDict(message, preserving_proto_field_name=True))


def live() -> Question:
    """Whether the server runs: bool."""
    return Question("ServerLive", pb.ServerLiveRequest(), lambda answer: bool(answer.live))


def ready() -> Question:
    """Whether the server and all its models are ready: bool."""
    return Question("ServerReady", pb.ServerReadyRequest(), lambda answer: bool(answer.ready))


def model_ready(name: str) -> Question:
    """Whether one model is ready: bool."""
    return Question("ModelReady", pb.ModelReadyRequest(name=name), lambda answer: bool(answer.ready))


def metadata() -> Question:
    """Name, version and extensions of the server: dict."""
    return Question("ServerMetadata", pb.ServerMetadataRequest(), _plain)


def model_metadata(name: str) -> Question:
    """Versions, inputs and outputs of a model: dict."""
    return Question("ModelMetadata", pb.ModelMetadataRequest(name=name), _plain)


def config(name: str) -> Question:
    """A model's config as the server completed it: dict."""
    return Question("ModelConfig", pb.ModelConfigRequest(name=name), lambda answer: _plain(answer.config))


def statistics(name: str) -> Question:
    """Counts and durations of a model, one dict per version: list of dicts."""
    return Question(
        "ModelStatistics",
        pb.ModelStatisticsRequest(name=name),
        lambda answer: [_plain(one) for one in answer.model_stats],
    )


def _config_message(name: str) -> Question:
    return Question("ModelConfig", pb.ModelConfigRequest(name=name), lambda answer: answer.config)


def find_model(name: str | None, url: str, tokenizer: Path | None = None) -> Generator[Question, Any, ServedModel]:
    """Ask what must be known of the model ``name`` (None: the best front there is) before it can be sent requests.

    ``tokenizer``: the folder of one with which text is made here, over a model that takes ids.
    """
    if name is None:
        for front in FRONTS if tokenizer is None else FRONTS[-1:]:
            if (yield model_ready(front)):
                name = front
                break
        else:
            raise NotReady(f"{url}: none of the models {', '.join(FRONTS)} is ready; wait, or name another (--model)")
    model_config = yield _config_message(name)
    engine = dialect.engine_step(model_config)
    engine_config = (yield _config_message(engine)) if engine else model_config
    found = dialect.served_model(model_config, engine_config)
    if tokenizer is None:
        return found
    limits = {}
    if (yield model_ready(FRONTS[0])):
        config = yield _config_message(FRONTS[0])
        limits = {key: value.string_value for key, value in config.parameters.items()}
    return dialect.with_local_text(found, LocalText(tokenizer, limits))
