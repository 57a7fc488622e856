"""What clients and Prometheus are told of `--overflow`: how many pairs, and of which tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from lightmoe.core import LoadReport, OutputCallback, OverflowReport, OverflowRule, Request
from lightmoe.server.tokenizer import Tokenizer
from tests.server.fakes import FakeEngine, new_client, new_engine
from tests.server.test_http_answers import COMPLETIONS, complete, stream

RULE = OverflowRule("redirect", 1.25)


@dataclass
class Overflowing(FakeEngine):
    """Every output says that a pair of the prompt's first token was redirected, and two of it."""

    def load(self) -> LoadReport:
        counts = OverflowReport(RULE, num_moved_pairs=41, num_layers=12, num_left=3)
        return replace(super().load(), overflow=counts)

    def submit(self, request: Request, on_output: OutputCallback) -> None:
        positions = iter(range(100, 1000))
        super().submit(
            request,
            lambda output: on_output(replace(output, moved_pairs=((0, 1), (next(positions), 2)))),
        )


@pytest.fixture
def http(tokenizer: Tokenizer) -> Iterator[TestClient]:
    plain = new_engine(tokenizer)
    plain.close()
    engine = Overflowing(replace(plain.model, overflow=RULE), plain.answer)
    with new_client(engine, tokenizer) as client:
        yield client
    engine.close()


def test_usage_says_how_many_pairs_of_which_tokens(http: TestClient) -> None:
    answer = complete(http, n=2)
    num_outputs = answer["usage"]["completion_tokens"] // 2
    one = [[0, num_outputs], *([100 + number, 2] for number in range(num_outputs))]
    assert answer["usage"]["overflow"] == {
        "mode": "redirect",
        "pairs": 2 * 3 * num_outputs,
        "positions": [one, one],
    }


def test_a_stream_says_at_its_end_of_which_tokens(http: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = stream(http, COMPLETIONS, stream_options=options)
    assert [set(chunk["usage"]["overflow"]) for chunk in chunks] == [{"mode", "pairs"}] * len(
        chunks
    )
    (positions,) = last["usage"]["overflow"]["positions"]
    assert sum(pairs for _, pairs in positions) == last["usage"]["overflow"]["pairs"] > 0


def test_counters_name_the_mode(http: TestClient) -> None:
    found = {
        (sample.name, sample.labels.get("mode")): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }
    assert found["lightmoe_overflow_pairs_total", "redirect"] == 41
    assert found["lightmoe_overflow_layers_total", "redirect"] == 12
    assert found["lightmoe_overflow_left_pairs_total", "redirect"] == 3
    assert found["lightmoe_overflow_capacity_factor", None] == 1.25


def test_models_and_load_say_that_tokens_change(http: TestClient) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert model["overflow"] == "redirect over 1.25 x the mean load"
    assert http.get("/v1/experts/load").json()["overflow"] == {
        "mode": "redirect",
        "capacity_factor": 1.25,
        "num_moved_pairs": 41,
        "num_layers": 12,
        "num_left": 3,
    }


def test_without_it_nothing_is_said(tokenizer: Tokenizer) -> None:
    engine = new_engine(tokenizer)
    with new_client(engine, tokenizer) as client:
        assert "overflow" not in complete(client)["usage"]
        assert "lightmoe_overflow" not in client.get("/metrics").text
        assert client.get("/v1/experts/load").json()["overflow"] is None
    engine.close()
