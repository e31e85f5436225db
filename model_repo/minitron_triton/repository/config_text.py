"""config.pbtxt read with Triton's own protobuf (the one that tritonclient carries)."""

from __future__ import annotations

from typing import Any

from minitron.errors import RepositoryError


def parse(text: str, where: str) -> Any:
    """Parse a config.pbtxt into an ``inference.ModelConfig`` message; raises RepositoryError naming line and column."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise RepositoryError(f"{where} is no config of Triton: {error}") from error


def quote(value: str) -> str:
    """A string literal of protobuf's text format."""
    from google.protobuf import text_encoding

    return f'"{text_encoding.CEscape(value.encode(), as_utf8=True)}"'
