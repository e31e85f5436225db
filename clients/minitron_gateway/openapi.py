"""The OpenAPI document of the endpoints, from the very models that check the bodies."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from minitron.version import VERSION
from minitron_gateway.bodies import ChatBody, CompletionBody

_ERRORS = {
    "400": "the request is wrong", "401": "no valid key", "404": "no such model", "413": "the body is too large",
    "429": "too many streams, or the engine's queue is full", "500": "the engine failed",
    "503": "no server is ready, or the gateway is stopping",
}  # fmt: skip
_ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"},
        "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
    }}},
}  # fmt: skip


def document(model: str) -> dict[str, Any]:
    """OpenAPI 3.1; ``model`` is the name that is served."""
    bodies, schemas = models_json_schema(
        [(CompletionBody, "validation"), (ChatBody, "validation")], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": f"minitron gateway ({model})", "version": VERSION},
        "paths": {
            "/v1/completions": {"post": _generates("Go on from prompts", bodies[CompletionBody, "validation"])},
            "/v1/chat/completions": {"post": _generates("Answer a conversation", bodies[ChatBody, "validation"])},
            "/v1/models": {"get": _gets("The model that is served")},
            "/health": {"get": _gets("The process answers")},
            "/health/ready": {"get": _gets("Requests are taken")},
            "/metrics": {"get": _gets("Counters in Prometheus' text")},
        },
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _generates(summary: str, body: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {"description": "The answer", "content": {"application/json": {}, "text/event-stream": {}}},
            **{status: {"description": why, "content": error} for status, why in _ERRORS.items()},
        },
    }


def _gets(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "It is so"}}}
