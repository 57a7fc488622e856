"""What both routes answer, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from lightmoe.errors import QueueFullError, RankError, ShuttingDownError
from lightmoe.server.tokenizer import Tokenizer
from tests.server.fakes import ANSWER, MAX_MODEL_LEN, FakeEngine, events_of, new_client, texts

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def complete(http: TestClient, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "hello", "max_tokens": 60, **fields}
    response = http.post(COMPLETIONS, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def stream(http: TestClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    body: dict[str, Any] = {"stream": True, "max_tokens": 60, **fields}
    body.setdefault(*(("prompt", "hello") if path == COMPLETIONS else ("messages", HELLO)))
    return events_of(http.post(path, json=body))  # type: ignore[return-value]


def test_a_completion(http: TestClient, engine: FakeEngine) -> None:
    answer = complete(http)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    choice = {"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}
    assert answer["choices"] == [choice]
    num_prompt, num_answer = len(engine.submitted[0].prompt_token_ids), len(engine.answer) + 1
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
    }
    assert engine.aborted == []


def test_a_chat(http: TestClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    answer = http.post(CHAT, json={"messages": HELLO}).json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert choice["finish_reason"] == "stop"
    (request,) = engine.submitted
    assert list(request.prompt_token_ids) == tokenizer.chat(HELLO)
    assert request.params.max_tokens == MAX_MODEL_LEN - len(request.prompt_token_ids)


def test_message_parts_are_joined(http: TestClient, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    for content in ("hello", parts):
        message = {"role": "user", "content": content}
        assert http.post(CHAT, json={"messages": [message]}).status_code == 200
    first, second = engine.submitted
    assert first.prompt_token_ids == second.prompt_token_ids


def test_the_model_s_defaults_hold_where_the_request_is_silent(
    http: TestClient, engine: FakeEngine
) -> None:
    complete(http)
    complete(http, temperature=0, top_k=None, top_p=0.5, max_tokens=None, seed=3)
    silent, spoken = (request.params for request in engine.submitted)
    assert (silent.temperature, silent.top_k, silent.top_p) == (0.7, 20, 1.0)
    assert isinstance(silent.top_k, int)
    assert (spoken.temperature, spoken.top_k, spoken.top_p) == (0, 20, 0.5)
    assert (spoken.max_tokens, spoken.seed, silent.seed) == (16, 3, None)


def test_max_tokens_ends_with_length(http: TestClient, tokenizer: Tokenizer) -> None:
    answer = complete(http, max_tokens=4)
    ids = tokenizer.encode(ANSWER, add_special_tokens=False)[:4]
    assert answer["choices"][0]["text"] == tokenizer.decode(ids).rstrip("\ufffd")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4


def test_stop_token_ids_are_not_part_of_the_text(http: TestClient, tokenizer: Tokenizer) -> None:
    (comma,) = tokenizer.encode(",", add_special_tokens=False)
    answer = complete(http, stop_token_ids=[comma])
    assert answer["choices"][0]["text"] == "hello 😀 world"
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stop", ["rld, 漢", ["zzz", "rld, 漢"]])
def test_a_stop_string_ends_text_and_engine(
    http: TestClient, engine: FakeEngine, stop: str | list[str]
) -> None:
    engine.hold_after = len(engine.answer) - 2
    answer = complete(http, stop=stop)
    assert answer["choices"][0]["text"] == "hello 😀 wo"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert engine.aborted == [engine.submitted[0].request_id]
    streamed = stream(http, COMPLETIONS, stop=stop, stream_options={"include_usage": True})
    assert texts(streamed) == "hello 😀 wo"
    assert streamed[-2]["choices"][0]["finish_reason"] == "stop"
    assert streamed[-1]["usage"] == answer["usage"]


def test_a_stream_of_completions(http: TestClient) -> None:
    whole = complete(http)
    chunks = stream(http, COMPLETIONS)
    assert texts(chunks) == ANSWER
    assert len(chunks) > 5
    assert all("\ufffd" not in chunk["choices"][0]["text"] for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (
        len(chunks) - 1
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {whole["object"]}
    assert not any("usage" in chunk for chunk in chunks)


def test_a_stream_of_chat(http: TestClient) -> None:
    first, *rest = stream(http, CHAT)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in rest) == ANSWER
    assert rest[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_usage_in_a_stream(http: TestClient, engine: FakeEngine, path: str) -> None:
    *chunks, last = stream(http, path, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    num_prompt, num_answer = len(engine.submitted[0].prompt_token_ids), len(engine.answer) + 1
    assert last["usage"]["prompt_tokens"] == num_prompt
    assert last["usage"]["completion_tokens"] == num_answer

    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk["usage"]["completion_tokens"] for chunk in stream(http, path, stream_options=options)
    ]
    assert counts == sorted(counts)
    assert counts[0] <= 1
    assert counts[-1] == num_answer


def test_choices_and_seeds(http: TestClient, engine: FakeEngine) -> None:
    answer = complete(http, prompt=["hello", "the cat"], n=2, seed=7)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [request.params.seed for request in engine.submitted] == [7, 8, 7, 8]
    prompts = [request.prompt_token_ids for request in engine.submitted]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert len({request.request_id for request in engine.submitted}) == 4
    assert answer["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[2])
    assert answer["usage"]["completion_tokens"] == 4 * (len(engine.answer) + 1)


def test_streamed_choices_are_told_apart(http: TestClient) -> None:
    chunks = stream(http, COMPLETIONS, n=3)
    by_index = {
        index: [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        for index in range(3)
    }
    for choices in by_index.values():
        assert "".join(choice["text"] for choice in choices) == ANSWER
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]


@pytest.mark.parametrize("prompt", [[2, 3, 4], [[2, 3, 4]], [[2, 3, 4], [5, 6]]])
def test_prompts_as_token_ids(http: TestClient, engine: FakeEngine, prompt: list[Any]) -> None:
    complete(http, prompt=prompt)
    expected = prompt if isinstance(prompt[0], list) else [prompt]
    assert [list(request.prompt_token_ids) for request in engine.submitted] == expected


def test_echo(http: TestClient) -> None:
    answer = complete(http, prompt=["hello", "the cat"], echo=True, n=2)
    expected = ["hello" + ANSWER] * 2 + ["the cat" + ANSWER] * 2
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert texts(stream(http, COMPLETIONS, echo=True)) == "hello" + ANSWER


def test_completion_logprobs(http: TestClient, engine: FakeEngine) -> None:
    choice = complete(http, logprobs=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert engine.submitted[0].params.logprobs == 2
    num_tokens = len(engine.answer)
    assert logprobs["token_logprobs"] == [-0.5] * num_tokens
    assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == num_tokens
    assert all(-0.5 in top.values() for top in logprobs["top_logprobs"])
    # A token that starts at an offset starts there in the text, too.
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)

    chunks = stream(http, COMPLETIONS, logprobs=2)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name in ("tokens", "text_offset", "top_logprobs"):
        assert sum((part[name] for part in parts), []) == logprobs[name]


def test_chat_logprobs(http: TestClient, engine: FakeEngine) -> None:
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    content = http.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert bytes(sum((entry["bytes"] for entry in content), [])).decode() == ANSWER
    assert content[0]["logprob"] == -0.5
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    assert content[0]["top_logprobs"][1]["logprob"] == -9999.0

    chunks = stream(http, CHAT, logprobs=True, top_logprobs=2)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks[1:]]
    assert sum((part["content"] for part in parts), []) == content
    assert engine.submitted[0].params.logprobs == 2


def test_no_tokenizer_means_token_ids_in_and_out(engine: FakeEngine) -> None:
    with new_client(engine, None) as http:
        choice = complete(http, prompt=[2, 3], logprobs=1)["choices"][0]
        assert choice["text"] == ""
        assert choice["token_ids"] == [*engine.answer, 1]
        assert choice["logprobs"]["tokens"][0] == f"token_id:{engine.answer[0]}"
        ids = [i for chunk in stream(http, COMPLETIONS, prompt=[2, 3])
               for i in chunk["choices"][0]["token_ids"]]  # fmt: skip
        assert ids == [*engine.answer, 1]
        for body in ({"prompt": "hello"}, {"prompt": [2], "stop": "x"}, {"prompt": [2], "echo": 1}):
            assert http.post(COMPLETIONS, json=body).status_code == 400
        refused = http.post(COMPLETIONS, json={"prompt": "hello"}).json()["error"]
        assert "token ids" in refused["message"]
        assert http.post(CHAT, json={"messages": HELLO}).status_code == 400


def test_token_ids_on_request(http: TestClient, engine: FakeEngine) -> None:
    choice = complete(http, return_token_ids=True)["choices"][0]
    assert choice["token_ids"] == [*engine.answer, 1]
    assert choice["text"] == ANSWER


def test_served_names(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    with new_client(engine, tokenizer, served_model_names=["org/one", "two"]) as http:
        assert complete(http)["model"] == "org/one"
        assert complete(http, model="two")["model"] == "two"
        assert http.post(COMPLETIONS, json={"prompt": "x", "model": "tiny"}).status_code == 404
        assert [entry["id"] for entry in http.get("/v1/models").json()["data"]] == [
            "org/one",
            "two",
        ]
        assert http.get("/v1/models/org/one").json()["root"] == "tiny"


def test_models_say_length_and_dummy_weights(http: TestClient) -> None:
    (entry,) = http.get("/v1/models").json()["data"]
    assert entry["object"] == "model"
    assert entry["max_model_len"] == MAX_MODEL_LEN
    assert entry["dummy_weights"] is False
    missing = http.get("/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_expert_load(http: TestClient) -> None:
    load = http.get("/v1/experts/load").json()
    assert load["expert_tokens"] == [[4, 0, 2], [3, 3, 0]]
    assert load["rank_pairs"] == [[4, 3], [2, 3]]
    assert (load["num_layers"], load["num_experts"], load["num_ranks"]) == (2, 3, 2)
    assert load["rank_kinds"] == ["home", "spare"]
    assert load["placement"][0][2] == [0, 1]
    assert (load["epoch"], load["num_steps"], load["model"]) == (1, 7, "tiny")


def test_health_and_readiness(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    stopping = False
    with new_client(engine, tokenizer, is_stopping=lambda: stopping) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert len(http.get("/ready").json()["ranks"]) == 2
        stopping = True
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 503
        stopping = False
        engine.error = RankError("rank 3 died; start the server again")
        for path in ("/health", "/ready"):
            response = http.get(path)
            assert response.status_code == 503
            assert "rank 3" in response.json()["reason"]
        response = http.post(COMPLETIONS, json={"prompt": "hello"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "rank_lost"


@pytest.mark.parametrize("is_stream", [False, True])
def test_refusals_of_the_engine(http: TestClient, engine: FakeEngine, is_stream: bool) -> None:
    body = {"prompt": "hello", "stream": is_stream}
    engine.refusal = QueueFullError("256 requests are waiting; try again later")
    full = http.post(COMPLETIONS, json=body)
    assert full.status_code == 429
    assert int(full.headers["retry-after"]) >= 1
    assert full.json()["error"] == {
        "message": "256 requests are waiting; try again later",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    engine.refusal = ShuttingDownError("the server is stopping")
    stopping = http.post(COMPLETIONS, json=body)
    assert (stopping.status_code, stopping.json()["error"]["code"]) == (503, "shutting_down")
    engine.refusal = None
    assert http.post(COMPLETIONS, json={"prompt": "hello"}).status_code == 200


def test_when_one_of_several_is_refused_the_others_are_aborted(
    http: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.hold_after = 0
    submit = engine.submit

    def refuse_third(request: Any, on_output: Any) -> None:
        if len(engine.submitted) == 2:
            raise QueueFullError("full")
        submit(request, on_output)

    monkeypatch.setattr(engine, "submit", refuse_third)
    response = http.post(COMPLETIONS, json={"prompt": "hello", "n": 4})
    assert response.status_code == 429
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.submitted)
    assert engine.num_running == 0


def test_an_engine_failure_whole_and_in_a_stream(http: TestClient, engine: FakeEngine) -> None:
    engine.failure, engine.fail_after = RankError("rank 3 died"), 3
    response = http.post(COMPLETIONS, json={"prompt": "hello", "n": 2})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "rank_lost"

    *chunks, last = stream(http, COMPLETIONS)
    assert texts(chunks)
    assert last["error"]["message"] == "rank 3 died"
    assert engine.num_running == 0


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_bug_of_ours_tells_nothing_and_stops_nothing(
    http: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    def explode(self: object, output: object) -> None:
        raise ZeroDivisionError("secret /home/me")

    with monkeypatch.context() as patch:
        patch.setattr("lightmoe.server.choice.Choice.add", explode)
        response = http.post(COMPLETIONS, json={"prompt": "hello", "stream": is_stream})
    assert response.status_code == (200 if is_stream else 500)
    error = events_of(response)[0]["error"] if is_stream else response.json()["error"]
    assert error["code"] == "internal_error"  # type: ignore[index]
    assert "secret" not in json.dumps(error)
    assert engine.num_running == 0
    assert complete(http)["choices"][0]["text"] == ANSWER


def test_request_ids(http: TestClient) -> None:
    given = http.get("/version", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    made = http.get("/version", headers={"X-Request-Id": "a b\t" * 99})
    assert len(made.headers["x-request-id"]) == 32
