"""GET /openapi.json, made of the pydantic models that parse requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lightmoe.server.schema import ChatRequest, CompletionRequest, RouteRequest

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_GENERATED = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
_OBJECT = {"application/json": {"schema": {"type": "object"}}}
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}

_POST_ERRORS = {
    400: "a field is wrong; `param` names it",
    401: "no valid key",
    403: "a foreign host or origin",
    404: "no such model",
    408: "the body did not come in time",
    413: "the body is over 4 MiB",
    415: "the body is not JSON",
    429: "the queue is full; come back after Retry-After seconds",
    503: "the server is draining, or has lost a rank",
}
_GETS = {
    "/v1/models": "The served model under each of its names",
    "/v1/models/{name}": "One model",
    "/v1/experts/load": "Tokens per layer and expert, pairs per rank and layer, and the placement",
    "/health": "Whether the engine lives",
    "/ready": "Whether new requests are taken",
    "/version": "The server's version",
    "/metrics": "Counters for Prometheus",
}


def openapi_document(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 description of the server."""
    _, definitions = models_json_schema(
        [(model, "validation") for model in (CompletionRequest, ChatRequest, RouteRequest)],
        ref_template="#/components/schemas/{model}",
    )
    posts = {
        "/v1/completions": {"post": _post(CompletionRequest, "Continue prompts")},
        "/v1/chat/completions": {"post": _post(ChatRequest, "Answer a conversation")},
        "/v1/experts/route": {"post": _post(RouteRequest, "Change the route", _OBJECT)},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Light-MoE", "version": version},
        "paths": posts | {path: {"get": _get(path, text)} for path, text in _GETS.items()},
        "components": {
            "schemas": definitions["$defs"] | {"Error": _ERROR_SCHEMA},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(
    model: type[BaseModel], summary: str, answer: dict[str, Any] = _GENERATED
) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "The answer", "content": answer}}
        | {
            str(status): {"description": text, "content": _ERROR}
            for status, text in _POST_ERRORS.items()
        },
    }


def _get(path: str, summary: str) -> dict[str, Any]:
    content = {"text/plain": {}} if path == "/metrics" else _OBJECT
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": content}},
    }
    for status in _get_errors(path):
        error = _OBJECT if status == 503 else _ERROR
        operation["responses"][str(status)] = {"description": "see `error`", "content": error}
    if "{name}" in path:
        operation["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation


def _get_errors(path: str) -> tuple[int, ...]:
    if path in ("/health", "/ready"):
        return (403, 503)
    return (401, 403, 404) if "{name}" in path else (401, 403)
