"""The OpenAPI document of the endpoints, from the very models that check the bodies."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from minitron.version import VERSION
from minitron_gateway.bodies import ChatBody, CompletionBody

_ERRORS = {
    400: "the request is wrong", 401: "no valid key", 404: "no such model", 413: "the body is too large",
    429: "too many streams, or the engine's queue is full", 500: "the engine failed",
    503: "no server is ready, or the gateway is stopping",
}  # fmt: skip
_ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"},
        "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
    }}},
}  # fmt: skip
_KEY = {"key": {"type": "http", "scheme": "bearer"}}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


def document(model: str, *, keyed: bool) -> dict[str, Any]:
    """OpenAPI 3.1; ``model`` is the name that is served, ``keyed``: whether a key is demanded."""
    bodies, schemas = models_json_schema(
        [(CompletionBody, "validation"), (ChatBody, "validation")], ref_template="#/components/schemas/{model}"
    )
    completion, chat = (bodies[body, "validation"] for body in (CompletionBody, ChatBody))
    paths: dict[str, dict[str, Any]] = {
        "/v1/completions": {"post": _generates("Go on from prompts", completion)},
        "/v1/chat/completions": {"post": _generates("Answer a conversation", chat)},
        "/v1/models": {"get": _gets("The model that is served")},
        "/v1/models/{name}": {"get": _gets("The same by its name", 404) | {"parameters": [_NAME]}},
        "/health": {"get": _gets("The process answers")},
        "/health/ready": {"get": _gets("Requests are taken")},
        "/metrics": {"get": _gets("Counters in Prometheus' text")},
        "/openapi.json": {"get": _gets("This document")},
    }
    paths["/health/ready"]["get"]["responses"]["503"] = {"description": "They are not"}
    if keyed:
        for operations in (one for path, one in paths.items() if path.startswith("/v1/")):
            for operation in operations.values():
                operation["security"] = [{name: []} for name in _KEY]
                operation["responses"] |= _refusals(401)
    schemes = {"securitySchemes": _KEY} if keyed else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"minitron gateway ({model})", "version": VERSION},
        "paths": paths,
        "components": {"schemas": {**schemas["$defs"], "Error": _ERROR}, **schemes},
    }


def _generates(summary: str, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {"description": "The answer", "content": {"application/json": {}, "text/event-stream": {}}},
            **_refusals(*(status for status in _ERRORS if status != 401)),
        },
    }


def _gets(summary: str, *errors: int) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "It is so"}, **_refusals(*errors)}}


def _refusals(*statuses: int) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": _ERRORS[status], "content": error} for status in statuses}
