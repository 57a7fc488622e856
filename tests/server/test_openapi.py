"""/openapi.json tells the truth: schemathesis makes requests from it, and every answer must fit."""

from __future__ import annotations

from typing import Any

import httpx
import hypothesis
import schemathesis
from jsonschema import Draft202012Validator
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from tests.server.fakes import FakeEngine


def test_the_document(http: TestClient) -> None:
    document = http.get("/openapi.json").json()
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    routes = {getattr(route, "path", "") for route in http.app.routes}  # type: ignore[attr-defined]
    described = {path.replace("{name}", "{name:path}") for path in document["paths"]}
    assert described <= routes
    assert routes - described == {"/", "/events", "/openapi.json"}
    assert "prompt" in document["components"]["schemas"]["CompletionRequest"]["required"]


SETTINGS = hypothesis.settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def test_what_schemathesis_sends_is_answered_as_described(url: str, engine: FakeEngine) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        _exercise(result.ok(), url)
    assert engine.submitted
    assert engine.num_running == 0


def _exercise(operation: APIOperation[Any, Any, Any], url: str) -> None:
    @SETTINGS
    @hypothesis.given(case=operation.as_strategy())
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=url, checks=CHECKS)

    check()
