"""What the page at `/` is fed: counters since the start become snapshots with what is new in them.

One `SnapshotFeed` belongs to one open page. It is pure: no sockets and no clock of its own (the
engine's uptime is the clock), so the route only awaits and encodes.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from lightmoe.core import BalanceReport, EngineStats, LoadReport, ModelInfo

RATE_WINDOW_SECONDS = 2.0
SHORTEST_RATE_SECONDS = 0.05
TOTALS_EVERY_SECONDS = 5.0

Snapshot = dict[str, object]


class SnapshotFeed:
    """Turns the engine's counters into the snapshots of one page.

    Counts named `recent` are what came since the previous snapshot (zero in the first one), so
    the first snapshot's totals plus all recent counts are always the current totals.
    """

    def __init__(self, model: ModelInfo, *, has_tokenizer: bool) -> None:
        self._model = model
        self._has_tokenizer = has_tokenizer
        self._expert_tokens: np.ndarray | None = None
        self._rank_pairs: np.ndarray | None = None
        self._epoch: int | None = None
        self._num_events = 0
        self._sent_stats: tuple[object, ...] | None = None
        self._sent_rate = 0.0
        self._totals_at = 0.0
        self._generated: deque[tuple[float, int]] = deque()

    def has_news(self, stats: EngineStats) -> bool:
        """True if the page would change: something moved, or the last rate it saw was not yet 0."""
        return self._sent_rate > 0.0 or self._sent_stats != _what_moves(stats)

    def snapshot(self, load: LoadReport, stats: EngineStats) -> Snapshot:
        """What changed since the previous call, ready for JSON; totals and placement when due."""
        self._sent_stats = _what_moves(stats)
        self._sent_rate = self._tokens_per_second(stats)
        expert_tokens = np.array(load.expert_tokens, dtype=np.int64)  # [L, E], a copy
        rank_pairs = np.array(load.rank_pairs, dtype=np.int64)  # [W, L], a copy
        is_first = self._expert_tokens is None or self._rank_pairs is None
        previous_tokens = expert_tokens if self._expert_tokens is None else self._expert_tokens
        previous_pairs = rank_pairs if self._rank_pairs is None else self._rank_pairs
        self._expert_tokens, self._rank_pairs = expert_tokens, rank_pairs

        recent_pairs = rank_pairs - previous_pairs
        result = self._header(load, stats)
        result["ranks"] = _ranks(stats, recent_pairs, rank_pairs)
        result["expert_tokens_recent"] = (expert_tokens - previous_tokens).tolist()
        result["rank_pairs_recent"] = recent_pairs.tolist()
        if is_first or stats.uptime_seconds - self._totals_at >= TOTALS_EVERY_SECONDS:
            self._totals_at = stats.uptime_seconds
            result["expert_tokens_total"] = expert_tokens.tolist()
            result["rank_pairs_total"] = rank_pairs.tolist()
        if load.balance is not None:
            result["balance"] = self._balance(load.balance)
        if stats.host_tier is not None:
            result["host_tier_hit_rate"] = round(stats.host_tier.hit_rate, 4)
        if load.epoch != self._epoch:
            self._epoch = load.epoch
            result["placement"] = load.placement
        return result

    def _balance(self, report: BalanceReport) -> Snapshot:
        """Counters, and the events that this page has not seen: [epoch, text], oldest first."""
        num_new = min(report.num_events - self._num_events, len(report.events))
        self._num_events = report.num_events
        return {
            "error": report.error,
            "num_migrations": report.num_migrations,
            "num_moved_experts": report.num_moved_experts,
            "moved_bytes": report.moved_bytes,
            "events": [
                [event.epoch, event.text] for event in report.events[len(report.events) - num_new :]
            ],
        }

    def _header(self, load: LoadReport, stats: EngineStats) -> Snapshot:
        num_layers, num_experts = load.expert_tokens.shape
        return {
            "model": self._model.name,
            "dummy_weights": self._model.dummy_weights,
            "has_tokenizer": self._has_tokenizer,
            "num_layers": int(num_layers),
            "num_experts": int(num_experts),
            "epoch": load.epoch,
            "route": load.route,
            "tokens_per_second": round(self._sent_rate, 2),
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "num_generated_tokens": stats.num_generated_tokens,
            "uptime_seconds": round(stats.uptime_seconds, 3),
        }

    def _tokens_per_second(self, stats: EngineStats) -> float:
        """Tokens generated in the last window (or since the page opened) over its seconds."""
        now, marks = stats.uptime_seconds, self._generated
        marks.append((now, stats.num_generated_tokens))
        while len(marks) > 1 and marks[1][0] <= now - RATE_WINDOW_SECONDS:
            marks.popleft()
        then, generated = marks[0]
        seconds = min(now - then, RATE_WINDOW_SECONDS)
        if seconds < SHORTEST_RATE_SECONDS:
            return 0.0
        return (stats.num_generated_tokens - generated) / seconds


def _what_moves(stats: EngineStats) -> tuple[object, ...]:
    """The counters without the clock: equal means that the page has nothing to redraw."""
    counters = (stats.num_steps, stats.num_running, stats.num_waiting, stats.num_generated_tokens)
    return (*counters, stats.ranks)


def _ranks(stats: EngineStats, recent: np.ndarray, total: np.ndarray) -> list[dict[str, object]]:
    """One entry per rank; pairs are summed over the layers of [W, L]."""
    recent_sums, total_sums = recent.sum(axis=1).tolist(), total.sum(axis=1).tolist()
    return [
        {
            "rank": rank.rank,
            "kind": rank.kind,
            "pairs_recent": recent_sums[rank.rank],
            "pairs_total": total_sums[rank.rank],
            "num_running": rank.num_running,
            "num_waiting": rank.num_waiting,
            "kv_usage": round(rank.kv_usage, 4),
        }
        for rank in stats.ranks
    ]
