"""GET /metrics: the engine's counters for Prometheus, read when they are scraped.

What boards for vLLM know has vLLM's names; ranks and experts have ours. What is not measured here
is left out rather than shown as zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lightmoe.core import (
    BalanceReport,
    EngineStats,
    HostTierCounts,
    LoadReport,
    OverflowReport,
)
from lightmoe.server.protocol import ServingEngine

CONTENT_TYPE = CONTENT_TYPE_LATEST


class EngineCollector(Collector):
    """Reads stats() and load() once a scrape."""

    def __init__(self, engine: ServingEngine, model_name: str) -> None:
        self._engine = engine
        self._labels = {"model_name": model_name, "engine": "0"}

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is depends on the engine, which is not asked before a scrape."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All metrics of one moment."""
        stats, load = self._engine.stats(), self._engine.load()
        yield from self._engine_metrics(stats)
        yield from _rank_metrics(stats, load)
        yield from _balance_metrics(load)
        if load.balance is not None:
            yield from _balancer_metrics(load.balance)
        if load.overflow is not None:
            yield from _overflow_metrics(load.overflow)
        if stats.host_tier is not None:
            yield from _host_tier_metrics(stats.host_tier)
        up = 0.0 if self._engine.error is not None else 1.0
        yield GaugeMetricFamily("lightmoe_engine_up", "1 while the engine runs", up)

    def _engine_metrics(self, stats: EngineStats) -> Iterator[Metric]:
        usages = [rank.kv_usage for rank in stats.ranks]
        gauges = {
            "vllm:num_requests_running": ("requests in a step", stats.num_running),
            "vllm:num_requests_waiting": ("requests in the queue", stats.num_waiting),
            "vllm:kv_cache_usage_perc": (
                "share of KV blocks in use, 0 to 1, mean over ranks",
                sum(usages) / max(len(usages), 1),
            ),
        }
        counters = {
            "vllm:prompt_tokens": ("prompt tokens computed", stats.num_prompt_tokens),
            "vllm:generation_tokens": ("tokens generated", stats.num_generated_tokens),
            "vllm:num_preemptions": ("sequences preempted", stats.num_preemptions),
            "lightmoe_requests_finished": ("requests finished", stats.num_finished),
            "lightmoe_steps": ("engine steps", stats.num_steps),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), value)
            yield counter
        yield GaugeMetricFamily("lightmoe_uptime_seconds", "age", stats.uptime_seconds)
        yield GaugeMetricFamily(
            "lightmoe_last_step_seconds", "time of the last step", stats.last_step_seconds
        )


def _rank_metrics(stats: EngineStats, load: LoadReport) -> Iterator[Metric]:
    labels = ["rank", "kind"]
    pairs = CounterMetricFamily(
        "lightmoe_rank_pairs", "(token, expert) pairs that a rank computed", labels=labels
    )
    for rank, kind in enumerate(load.rank_kinds):
        pairs.add_metric([str(rank), kind], int(load.rank_pairs[rank].sum()))
    running = GaugeMetricFamily("lightmoe_rank_running", "sequences on a rank", labels=labels)
    usage = GaugeMetricFamily(
        "lightmoe_rank_kv_usage", "share of a rank's KV blocks in use, 0 to 1", labels=labels
    )
    for info in stats.ranks:
        running.add_metric([str(info.rank), info.kind], info.num_running)
        usage.add_metric([str(info.rank), info.kind], info.kv_usage)
    yield from (pairs, running, usage)


def _balance_metrics(load: LoadReport) -> Iterator[Metric]:
    yield GaugeMetricFamily("lightmoe_placement_epoch", "epoch of the placement", load.epoch)
    balancedness = layer_balancedness(load.rank_pairs)
    if balancedness.size:
        yield GaugeMetricFamily(
            "lightmoe_moe_balancedness",
            "mean over ranks / maximum over ranks of the pairs computed, mean over layers",
            float(balancedness.mean()),
        )
        yield GaugeMetricFamily(
            "lightmoe_moe_balancedness_worst_layer",
            "the same for the layer where it is least",
            float(balancedness.min()),
        )


def _balancer_metrics(report: BalanceReport) -> Iterator[Metric]:
    counters = {
        "lightmoe_migrations": ("placements reached by migration", report.num_migrations),
        "lightmoe_migrated_experts": ("experts moved", report.num_moved_experts),
        "lightmoe_migrated_bytes": ("bytes of experts moved", report.moved_bytes),
        "lightmoe_migration_wait_seconds": (
            "what steps waited for pieces of experts",
            report.waited_seconds,
        ),
    }
    for name, (text, value) in counters.items():
        yield CounterMetricFamily(name, text, value)
    yield GaugeMetricFamily(
        "lightmoe_balancer_heartbeat_age_seconds",
        "since the balancer last said that it lives",
        report.heartbeat_age_seconds,
    )
    alive = 1.0 if report.error is None else 0.0
    yield GaugeMetricFamily("lightmoe_balancer_up", "1 while the balancer lives", alive)


def _overflow_metrics(report: OverflowReport) -> Iterator[Metric]:
    counters = {
        "lightmoe_overflow_pairs": (
            "pairs that did not go to the expert that the gate chose",
            report.num_moved_pairs,
        ),
        "lightmoe_overflow_layers": (
            "layers of a step in which a rank passed its capacity",
            report.num_layers,
        ),
        "lightmoe_overflow_left_pairs": (
            "pairs over the capacity that stayed: nothing else had room",
            report.num_left,
        ),
    }
    for name, (text, value) in counters.items():
        counter = CounterMetricFamily(name, text, labels=["mode"])
        counter.add_metric([report.rule.mode], value)
        yield counter
    yield GaugeMetricFamily(
        "lightmoe_overflow_capacity_factor",
        "the most that a rank should get of a layer, over the mean",
        report.rule.capacity_factor,
    )


def _host_tier_metrics(tier: HostTierCounts) -> Iterator[Metric]:
    counters = {
        "hits": ("experts that were in their slots when a layer needed them", tier.num_hits),
        "misses": ("experts that a step had to wait for", tier.num_misses),
        "prefetched": ("hits since the expert had been fetched ahead", tier.num_prefetched),
        "fetched_bytes": ("bytes of experts fetched from the host", tier.fetched_bytes),
        "wait_seconds": ("what ranks waited for experts, added up", tier.waited_seconds),
    }
    for name, (text, value) in counters.items():
        yield CounterMetricFamily(f"lightmoe_host_tier_{name}", text, value)


def layer_balancedness(rank_pairs: np.ndarray) -> np.ndarray:
    """Mean / maximum over ranks of [W, L] pairs, for every layer that had any; 1 is level."""
    if rank_pairs.size == 0:
        return np.zeros(0)
    most = rank_pairs.max(axis=0)
    used = most > 0
    return np.asarray(rank_pairs.mean(axis=0)[used] / most[used])


def new_registry(engine: ServingEngine, model_name: str) -> CollectorRegistry:
    """A registry of this server's own, so that several can live in one process."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, model_name))
    return registry


def render(registry: CollectorRegistry) -> bytes:
    """The text that Prometheus reads."""
    return bytes(generate_latest(registry))
