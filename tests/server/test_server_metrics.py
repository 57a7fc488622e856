"""/metrics, read with prometheus_client's own parser."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from lightmoe.core import HostTierCounts
from lightmoe.errors import RankError
from lightmoe.server.metrics import layer_balancedness
from tests.server.fakes import FakeEngine


def samples(http: TestClient) -> dict[tuple[str, str | None], float]:
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, sample.labels.get("rank")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_names_and_numbers(http: TestClient, engine: FakeEngine) -> None:
    found = samples(http)
    assert found["vllm:num_requests_running", None] == 0
    assert found["vllm:num_requests_waiting", None] == 0
    assert found["vllm:prompt_tokens_total", None] == 11
    assert found["vllm:generation_tokens_total", None] == 22
    assert found["vllm:kv_cache_usage_perc", None] == 0.25
    assert found["lightmoe_rank_pairs_total", "0"] == 7
    assert found["lightmoe_rank_pairs_total", "1"] == 5
    assert found["lightmoe_moe_balancedness", None] == (0.75 + 1.0) / 2
    assert found["lightmoe_moe_balancedness_worst_layer", None] == 0.75
    assert found["lightmoe_engine_up", None] == 1
    engine.error = RankError("rank 1 died")
    assert samples(http)["lightmoe_engine_up", None] == 0


def test_the_host_tier_is_counted_where_there_is_one(
    http: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(name.startswith("lightmoe_host_tier") for name, _ in samples(http))
    stats = replace(engine.stats(), host_tier=HostTierCounts(5, 3, 2, 1 << 20, 0.25))
    monkeypatch.setattr(engine, "stats", lambda: stats)

    found = samples(http)

    assert [
        found[f"lightmoe_host_tier_{name}_total", None]
        for name in ("hits", "misses", "prefetched", "fetched_bytes", "wait_seconds")
    ] == [5, 3, 2, 1 << 20, 0.25]


def test_labels_name_the_model(http: TestClient) -> None:
    text = http.get("/metrics").text
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"}' in text
    assert 'lightmoe_rank_pairs_total{kind="spare",rank="1"}' in text


def test_balancedness_is_over_ranks_and_skips_idle_layers() -> None:
    pairs = np.array([[4, 0, 2], [0, 0, 2]])  # [W, L]
    assert layer_balancedness(pairs).tolist() == [0.5, 1.0]
    assert layer_balancedness(np.zeros((2, 3))).tolist() == []
    assert layer_balancedness(np.zeros((0, 0))).tolist() == []
