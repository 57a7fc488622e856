"""SnapshotFeed: recent counts add up to totals, and silence stays silent."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.core import EngineStats, HostTierCounts, LoadReport, ModelInfo, RankStats
from lightmoe.telemetry.dashboard import TOTALS_EVERY_SECONDS, Snapshot, SnapshotFeed

NUM_LAYERS, NUM_EXPERTS, NUM_RANKS = 2, 3, 4

MODEL = ModelInfo(
    name="mixtral-lite",
    folder="models/mixtral-lite",
    architecture="MixtralForCausalLM",
    num_layers=NUM_LAYERS,
    num_experts=NUM_EXPERTS,
    vocab_size=4096,
    max_model_len=2048,
    eos_token_ids=(2,),
    generation_defaults={},
)


def make_stats(seconds: float, num_generated: int = 0, num_running: int = 0) -> EngineStats:
    ranks = tuple(
        RankStats(
            rank=rank,
            kind="spare" if rank == NUM_RANKS - 1 else "home",
            num_running=num_running,
            num_waiting=0,
            kv_usage=0.25,
        )
        for rank in range(NUM_RANKS)
    )
    return EngineStats(
        num_steps=num_generated,
        num_running=num_running,
        num_waiting=0,
        num_prompt_tokens=0,
        num_generated_tokens=num_generated,
        num_finished=0,
        num_preemptions=0,
        uptime_seconds=seconds,
        last_step_seconds=0.01,
        ranks=ranks,
    )


def make_load(epoch: int = 0) -> LoadReport:
    return LoadReport(
        expert_tokens=np.zeros((NUM_LAYERS, NUM_EXPERTS), dtype=np.int64),
        rank_pairs=np.zeros((NUM_RANKS, NUM_LAYERS), dtype=np.int64),
        rank_kinds=["home"] * (NUM_RANKS - 1) + ["spare"],
        placement=[[[expert] for expert in range(NUM_EXPERTS)] for _ in range(NUM_LAYERS)],
        epoch=epoch,
    )


def make_feed() -> SnapshotFeed:
    return SnapshotFeed(MODEL, has_tokenizer=True)


counts = st.lists(
    st.integers(0, 1000), min_size=NUM_LAYERS * NUM_EXPERTS, max_size=NUM_LAYERS * NUM_EXPERTS
)
steps = st.lists(st.tuples(counts, st.floats(0.0, 4.0), st.booleans()), min_size=1, max_size=12)


@settings(deadline=None)
@given(steps=steps)
def test_first_totals_plus_all_recent_counts_are_the_totals(
    steps: list[tuple[list[int], float, bool]],
) -> None:
    feed, load, seconds = make_feed(), make_load(), 0.0
    expert_sum = np.zeros_like(load.expert_tokens)
    pair_sum = np.zeros_like(load.rank_pairs)
    last_placement: object = None
    for index, (new, pause, is_moved) in enumerate(steps):
        seconds += pause
        load.expert_tokens += np.array(new).reshape(NUM_LAYERS, NUM_EXPERTS)  # in place: no alias
        load.rank_pairs[index % NUM_RANKS] += sum(new)
        load.epoch += is_moved
        snapshot = feed.snapshot(load, make_stats(seconds, num_generated=index))
        json.dumps(snapshot, allow_nan=False)
        if index == 0:
            expert_sum += np.array(snapshot["expert_tokens_total"])
            pair_sum += np.array(snapshot["rank_pairs_total"])
            assert not np.array(snapshot["expert_tokens_recent"]).any()
        expert_sum += np.array(snapshot["expert_tokens_recent"])
        pair_sum += np.array(snapshot["rank_pairs_recent"])
        assert (expert_sum == load.expert_tokens).all()
        assert (pair_sum == load.rank_pairs).all()
        if "expert_tokens_total" in snapshot:
            assert snapshot["expert_tokens_total"] == load.expert_tokens.tolist()
        assert ("placement" in snapshot) == (index == 0 or is_moved)
        last_placement = snapshot.get("placement", last_placement)
        assert last_placement == load.placement
        assert ranks_of(snapshot, "pairs_total") == load.rank_pairs.sum(axis=1).tolist()


def ranks_of(snapshot: Snapshot, field: str) -> list[object]:
    ranks = snapshot["ranks"]
    assert isinstance(ranks, list)
    return [rank[field] for rank in ranks]


def test_snapshot_says_what_the_page_shows() -> None:
    feed = SnapshotFeed(MODEL, has_tokenizer=False)
    load = make_load(epoch=2)
    feed.snapshot(load, make_stats(1.0))
    load.rank_pairs[3] += (5, 6)
    snapshot = feed.snapshot(load, make_stats(1.5, num_generated=10, num_running=1))
    assert snapshot["model"] == "mixtral-lite"
    assert snapshot["dummy_weights"] is False
    assert snapshot["has_tokenizer"] is False
    assert (snapshot["num_layers"], snapshot["num_experts"]) == (NUM_LAYERS, NUM_EXPERTS)
    assert snapshot["epoch"] == 2
    assert snapshot["tokens_per_second"] == 20.0
    assert snapshot["num_running"] == 1
    assert snapshot["num_generated_tokens"] == 10
    assert ranks_of(snapshot, "kind") == ["home", "home", "home", "spare"]
    assert ranks_of(snapshot, "pairs_recent") == [0, 0, 0, 11]
    assert ranks_of(snapshot, "kv_usage") == [0.25] * 4


def test_the_hit_rate_is_there_where_experts_take_turns() -> None:
    feed, load, stats = make_feed(), make_load(), make_stats(1.0)
    assert "host_tier_hit_rate" not in feed.snapshot(load, stats)
    tiered = replace(stats, host_tier=HostTierCounts(num_hits=3, num_misses=1))
    assert feed.snapshot(load, tiered)["host_tier_hit_rate"] == 0.75


def test_totals_come_every_few_seconds_only() -> None:
    feed, load = make_feed(), make_load()
    seconds = [0.0, 0.25, TOTALS_EVERY_SECONDS - 0.1, TOTALS_EVERY_SECONDS, 6.0, 2 * 5.0]
    has_totals = [
        "expert_tokens_total" in feed.snapshot(load, make_stats(moment)) for moment in seconds
    ]
    assert has_totals == [True, False, False, True, False, True]


def test_rate_is_over_the_last_two_seconds() -> None:
    feed, load = make_feed(), make_load()
    rates = [
        feed.snapshot(load, make_stats(100 + tick / 4, num_generated=min(tick, 20)))[
            "tokens_per_second"
        ]
        for tick in range(40)
    ]
    assert rates[0] == 0.0
    assert rates[4:21] == [4.0] * 17
    assert rates[24] == 2.0
    assert rates[28:] == [0.0] * 12


def test_rate_after_a_long_silence_counts_the_window_only() -> None:
    feed, load = make_feed(), make_load()
    feed.snapshot(load, make_stats(0.0))
    snapshot = feed.snapshot(load, make_stats(1000.0, num_generated=8))
    assert snapshot["tokens_per_second"] == 4.0


def test_rate_over_hardly_any_time_is_not_infinite() -> None:
    feed, load = make_feed(), make_load()
    feed.snapshot(load, make_stats(0.0))
    assert feed.snapshot(load, make_stats(5e-324, num_generated=1))["tokens_per_second"] == 0.0


def test_no_news_when_nothing_moves_but_the_clock() -> None:
    feed, load = make_feed(), make_load()
    assert feed.has_news(make_stats(0.0))
    feed.snapshot(load, make_stats(0.0))
    assert not feed.has_news(make_stats(60.0))
    assert feed.has_news(make_stats(60.0, num_running=1))
    assert feed.has_news(make_stats(60.0, num_generated=1))


@pytest.mark.parametrize("num_tokens", [1, 1000])
def test_the_rate_is_sent_until_it_is_zero(num_tokens: int) -> None:
    feed, load = make_feed(), make_load()
    feed.snapshot(load, make_stats(0.0))
    feed.snapshot(load, make_stats(0.25, num_tokens))
    seconds, rate = 0.25, 1.0
    while feed.has_news(make_stats(seconds, num_tokens)):
        rate = float(str(feed.snapshot(load, make_stats(seconds, num_tokens))["tokens_per_second"]))
        seconds += 0.25
        assert seconds < 5.0
    assert rate == 0.0
