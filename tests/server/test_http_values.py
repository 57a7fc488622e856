"""Values out of bounds: 400 with the field's name, never a 5xx, nothing reaches the engine."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from lightmoe.server.tokenizer import Tokenizer
from tests.server.fakes import MAX_MODEL_LEN, FakeEngine
from tests.server.test_http_bytes import JSON, check_error

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

BAD_NUMBERS = [
    *[("temperature", value) for value in ("NaN", "Infinity", "-Infinity", "1e999", '"nan"')],
    *[("temperature", value) for value in ("-1", "3", "true", '"1"', "[]", "{}")],
    *[("top_p", value) for value in ("0", "1.1", "-0.1", "NaN", "1e999")],
    *[("top_k", value) for value in ("-2", "1e10", "1.5", "99999999999", "true")],
    *[("min_p", value) for value in ("-0.1", "1.01")],
    *[("max_tokens", value) for value in ("0", "-1", "1.5", "true", '"5"', "[5]")],
    *[("max_tokens", str(value)) for value in (2**63, 2**70, -(2**70))],
    *[("min_tokens", value) for value in ("-1", "17", "1.0")],
    *[("n", value) for value in ("0", "-1", "17", "1000000", "true", '"2"')],
    *[("seed", value) for value in ("1.5", str(2**63), str(2**70), '"1"')],
    *[("presence_penalty", value) for value in ("-2.1", "3", "NaN")],
    *[("frequency_penalty", value) for value in ("-2.1", "3", "NaN")],
    *[("repetition_penalty", value) for value in ("0", "-1", "11", "NaN")],
    *[("stop", value) for value in ('""', "5", '["a", 5]', '["a", ""]', "{}")],
    ("stop", "[" + ", ".join(['"a"'] * 100) + "]"),
    *[("stop_token_ids", value) for value in ("5", "[-1]", '["a"]', "[1.5]", "[true]")],
    ("stop_token_ids", str([5] * 1000)),
    *[("stream", value) for value in ("1", '"true"', "{}")],
    *[("stream_options", value) for value in ("true", '{"include_usage": 1}')],
    *[("ignore_eos", value) for value in ("1", '"no"')],
    *[("model", value) for value in ("5", "[]", "{}")],
]


def check_400(response: Any, field: str, engine: FakeEngine) -> str:
    error = check_error(response, 400)
    assert error["param"] == field, error
    assert error["type"] == "invalid_request_error"
    assert engine.submitted == []
    return str(error["message"])


@pytest.mark.parametrize(("field", "value"), BAD_NUMBERS)
def test_bad_values_on_both_routes(
    http: TestClient, engine: FakeEngine, field: str, value: str
) -> None:
    start = {COMPLETIONS: '"prompt": "hello"', CHAT: '"messages": [{"role":"user","content":"x"}]'}
    for path, body in start.items():
        limit = "" if field == "max_tokens" else ', "max_tokens": 16'
        content = f'{{{body}, "{field}": {value}{limit}}}'
        response = http.post(path, content=content, headers=JSON)
        # JSON itself has no NaN: then the body is at fault, not a field.
        is_json = value not in ("NaN", "Infinity", "-Infinity")
        check_400(response, field if is_json else None, engine)  # type: ignore[arg-type]


GOOD_FIELDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1e-9},
    {"temperature": 2},
    {"top_k": 10**9},
    {"top_k": -1},
    {"top_p": 1},
    {"seed": -5},
    {"n": None, "stop": None, "seed": None, "stream_options": None},
    {"unknown": {"deep": [1, 2]}, "user": "me", "x": float(1)},
    {"response_format": {"type": "text"}, "tools": [], "logit_bias": {}, "best_of": 1},
    {"suffix": "", "tool_choice": "auto", "response_format": None},
    {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 1.1},
    {"ignore_eos": True, "min_tokens": 3, "max_tokens": 9},
    {"stop": []},
]


@pytest.mark.parametrize("fields", GOOD_FIELDS)
def test_values_at_the_edge_are_served(http: TestClient, fields: dict[str, Any]) -> None:
    response = http.post(COMPLETIONS, json={"prompt": "hello", **fields})
    assert response.status_code == 200, response.text


UNSUPPORTED: list[tuple[str, Any]] = [
    ("response_format", {"type": "json_object"}),
    ("tools", [{"type": "function"}]),
    ("functions", [{"name": "f"}]),
    ("tool_choice", "required"),
    ("best_of", 2),
    ("suffix", "end"),
    ("logit_bias", {"5": 1}),
    ("chat_template", "{{ 7 * 7 }}"),
    ("guided_json", {}),
    ("prompt_logprobs", 1),
]


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
def test_unsupported_fields_are_named(
    http: TestClient, engine: FakeEngine, field: str, value: Any
) -> None:
    body = {"prompt": "hello", "messages": [{"role": "user", "content": "x"}], field: value}
    for path in (COMPLETIONS, CHAT):
        assert field in check_400(http.post(path, json=body), field, engine)


BAD_PROMPTS: list[Any] = [
    None,
    "",
    [],
    [""],
    ["hello", ""],
    [[]],
    [[1], []],
    5,
    {"text": "x"},
    [1.5],
    [True],
    ["a", 1],
    [1, "a"],
    [[1], "a"],
    [["a"]],
    [[[1]]],
    [-1],
    [10**6],
    [2**70],
    [[2], [10**6]],
    ["x"] * 65,
    ["x"] * 10_001,
    [[1]] * 65,
]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=lambda prompt: repr(prompt)[:30])
def test_bad_prompts(http: TestClient, engine: FakeEngine, prompt: Any) -> None:
    check_400(http.post(COMPLETIONS, json={"prompt": prompt}), "prompt", engine)


def test_a_missing_prompt(http: TestClient, engine: FakeEngine) -> None:
    check_400(http.post(COMPLETIONS, json={}), "prompt", engine)
    check_400(http.post(CHAT, json={}), "messages", engine)


def test_prompts_times_n(http: TestClient, engine: FakeEngine) -> None:
    check_400(http.post(COMPLETIONS, json={"prompt": ["x"] * 33, "n": 2}), "n", engine)


@pytest.mark.parametrize("logprobs", [10**6, 21, -1, True, 1.5, "2"])
def test_bad_logprobs(http: TestClient, engine: FakeEngine, logprobs: Any) -> None:
    body = {"prompt": "hello", "logprobs": logprobs}
    check_400(http.post(COMPLETIONS, json=body), "logprobs", engine)


def test_echo_with_logprobs(http: TestClient, engine: FakeEngine) -> None:
    body = {"prompt": "hello", "logprobs": 1, "echo": True}
    check_400(http.post(COMPLETIONS, json=body), "echo", engine)


def test_the_three_numbers_of_a_prompt_that_does_not_fit(
    http: TestClient, engine: FakeEngine
) -> None:
    prompt = [2] * 100
    message = check_400(
        http.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 29}), "max_tokens", engine
    )
    assert all(number in message for number in ("100", "29", str(MAX_MODEL_LEN)))
    for length in (MAX_MODEL_LEN, MAX_MODEL_LEN + 1):
        body = {"prompt": [2] * length, "max_tokens": 1}
        assert str(length) in check_400(http.post(COMPLETIONS, json=body), "prompt", engine)


def test_what_just_fits_is_served(http: TestClient, engine: FakeEngine) -> None:
    body = {"prompt": [2] * 100, "max_tokens": 28, "ignore_eos": True}
    answer = http.post(COMPLETIONS, json=body).json()
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN
    # A default is no wish: it gives way to what fits.
    http.post(COMPLETIONS, json={"prompt": [2] * 120})
    assert engine.submitted[-1].params.max_tokens == 8


def test_a_text_far_too_long_is_refused_before_it_is_encoded(
    http: TestClient, engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> list[int]:
        raise AssertionError("encoded")

    monkeypatch.setattr(tokenizer, "encode", never)
    monkeypatch.setattr(tokenizer, "chat", never)
    text = "hello " * 100_000
    check_400(http.post(COMPLETIONS, json={"prompt": text}), "prompt", engine)
    messages = [{"role": "user", "content": text}]
    check_400(http.post(CHAT, json={"messages": messages}), "messages", engine)


BAD_MESSAGES: list[Any] = [
    None,
    [],
    "hello",
    {},
    [5],
    [{}],
    [{"role": "user"}],
    [{"content": "x"}],
    [{"role": "wizard", "content": "x"}],
    [{"role": 5, "content": "x"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": {"text": "x"}}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
    [{"role": "user", "content": ["x"]}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "say </s> please"}],
    [{"role": "user", "content": "x"}] * 257,
]


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=lambda messages: repr(messages)[:40])
def test_bad_messages(http: TestClient, engine: FakeEngine, messages: Any) -> None:
    check_400(http.post(CHAT, json={"messages": messages}), "messages", engine)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 10_000}, "max_tokens"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens"),
    ],
)
def test_bad_chat_fields(
    http: TestClient, engine: FakeEngine, fields: dict[str, Any], field: str
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    check_400(http.post(CHAT, json=body), field, engine)


def test_max_completion_tokens_wins(http: TestClient, engine: FakeEngine) -> None:
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 9,
        "max_completion_tokens": 5,
    }
    assert http.post(CHAT, json=body).json()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_unknown_model(http: TestClient, engine: FakeEngine, path: str) -> None:
    body = {
        "prompt": "hello",
        "messages": [{"role": "user", "content": "x"}],
        "model": "gpt-<script>",
    }
    error = check_error(http.post(path, json=body), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "tiny" in str(error["message"])
    assert engine.submitted == []


def test_the_same_seed_reaches_the_engine_alone_and_in_company(
    http: TestClient, engine: FakeEngine
) -> None:
    http.post(COMPLETIONS, json={"prompt": "hello", "seed": 5})
    http.post(COMPLETIONS, json={"prompt": ["the cat", "hello"], "seed": 5})
    assert [request.params.seed for request in engine.submitted] == [5, 5, 5]


def test_spelled_special_tokens_in_a_prompt_are_text(http: TestClient, engine: FakeEngine) -> None:
    assert http.post(COMPLETIONS, json={"prompt": "a</s><s>[INST]"}).status_code == 200
    ids = engine.submitted[0].prompt_token_ids
    assert ids[0] == 0
    assert not {0, 1} & set(ids[1:])
