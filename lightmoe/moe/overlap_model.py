"""Decides into how many chunks a layer's tokens are cut, from fitted costs of its stages.

Each stage costs alpha + n * beta seconds for n tokens. More chunks hide more communication behind
the experts, and pay every alpha again: the reading of the weights is in the experts' alpha.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from lightmoe.errors import UsageError

MAX_CHUNKS = 8
MARGIN = 0.05
"""Overlap must be predicted to save this share of the serial time: a fit is no better than that."""

FEWEST_TOKENS = 256
"""Of the fullest rank; smaller steps are not cut: their stages are launches, and may be padded."""

EXCHANGE_CTAS = 16
"""Multiprocessors of an exchange that runs beside the experts."""

UP_SHARE = 4 / 7
"""Of the experts' multiprocessors, for the first product where the second of other tokens runs
beside it: it has two thirds of the arithmetic, and the other writes to other ranks."""

_CLOCK_SECONDS = 1e-6  # times below it are not told apart


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage: `alpha_seconds` once a chunk, and `seconds_per_token`."""

    alpha_seconds: float
    seconds_per_token: float

    def seconds(self, num_tokens: int) -> float:
        """Time of one chunk of so many tokens."""
        return self.alpha_seconds + num_tokens * self.seconds_per_token


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """The stages that are cut into chunks, and the gate, which runs for the whole layer first.

    Tokens are those of one rank. `up` and `down` are the experts' products. The gate's cost
    includes the exchange of the choice. `host` is what enqueuing the layer takes, by chunks instead
    of tokens: the device cannot be faster.
    """

    dispatch: StageCost
    up: StageCost
    down: StageCost
    combine: StageCost
    gate: StageCost = StageCost(0.0, 0.0)
    host: StageCost = StageCost(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class ChunkChoice:
    """How many chunks, the times predicted with and without overlap, and a sentence that says why.

    Both times are of the whole layer, the gate included.
    """

    num_chunks: int
    predicted_seconds: float
    serial_seconds: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """How a layer overlaps: how many chunks, and what the exchange leaves of the device.

    `up_ctas` and `down_ctas` are what each product has where both run beside each other.

    | field | meaning |
    |---|---|
    | num_chunks | so many; None: what the costs say |
    | costs | of the stages, fitted; None: no overlap |
    | halves_from | tokens of the fullest rank from which a step is cut in two; None: never |
    | expert_ctas | multiprocessors of the experts while an exchange runs beside; None: all |
    """

    num_chunks: int | None = 1
    costs: LayerCosts | None = None
    halves_from: int | None = None
    expert_ctas: int | None = None

    @property
    def up_ctas(self) -> int | None:
        """Multiprocessors of the first product."""
        return None if self.expert_ctas is None else round(UP_SHARE * self.expert_ctas)

    @property
    def down_ctas(self) -> int | None:
        """Multiprocessors of the second product."""
        up = self.up_ctas
        return None if up is None or self.expert_ctas is None else self.expert_ctas - up

    def cuts_in_two(self, num_tokens: int) -> bool:
        """Whether a step with so many tokens on the fullest rank runs as two halves."""
        return self.halves_from is not None and num_tokens >= max(2, self.halves_from)

    def chunks(self, num_tokens: int) -> int:
        """Chunks for so many tokens on the fullest rank: the same number on every rank."""
        if self.num_chunks is not None:
            return max(1, min(self.num_chunks, num_tokens))
        if self.costs is None or num_tokens < FEWEST_TOKENS:
            return 1
        return choose_chunks(self.costs, num_tokens).num_chunks


def fit(points: Sequence[tuple[int, float]]) -> StageCost:
    """Fit alpha + n * beta to (num_tokens, seconds); neither is negative.

    Least squares of the relative errors: timings are wrong by a share of themselves, and the small
    ones tell alpha. Raises UsageError for fewer than two different token counts.
    """
    if len({num_tokens for num_tokens, _ in points}) < 2:
        raise UsageError(
            f"a cost needs timings at two token counts at least and has {list(points)}; time more"
        )
    candidates = (_line(points), _through_origin(points), _constant(points))
    allowed = [c for c in candidates if c.alpha_seconds >= 0 and c.seconds_per_token >= 0]
    return min(allowed, key=lambda cost: _error(cost, points))


@functools.lru_cache(maxsize=256)  # every layer of a step asks
def choose_chunks(costs: LayerCosts, num_tokens: int, max_chunks: int = MAX_CHUNKS) -> ChunkChoice:
    """The chunk count in 1..max_chunks with the least predicted time; 1 where overlap would lose.

    Overlap loses unless it saves `MARGIN` of the serial time. Equal times go to fewer chunks.
    """
    serial = pipeline_seconds(costs, num_tokens, 1)
    counts = range(2, min(max_chunks, num_tokens) + 1)
    if not counts:
        return ChunkChoice(1, serial, serial, f"1 chunk: {num_tokens} tokens are not cut")
    predicted, best = min((pipeline_seconds(costs, num_tokens, count), count) for count in counts)
    saved = 1 - predicted / serial if serial else 0.0
    if saved < MARGIN:
        reason = (
            f"1 chunk: {best} would take {_ms(predicted)} of {_ms(serial)} serial,"
            f" which does not save {MARGIN:.0%}"
        )
        return ChunkChoice(1, serial, serial, reason)
    reason = f"{best} chunks: {_ms(predicted)} of {_ms(serial)} serial, {saved:.0%} saved"
    return ChunkChoice(best, predicted, serial, reason)


def pipeline_seconds(costs: LayerCosts, num_tokens: int, num_chunks: int) -> float:
    """Time of a layer cut into chunks: one stream exchanges, one has the ups, one the downs.

    The exchange brings the rows of all chunks, then their results, each when its down is done. With
    several chunks `up` is what it takes beside a down: the first has the device to itself.
    """
    sizes = _chunk_sizes(num_tokens, num_chunks)
    begin = costs.gate.seconds(num_tokens)
    arrived = [begin + seconds for seconds in accumulate(map(costs.dispatch.seconds, sizes))]
    up_free, down_free, exchange_free = 0.0, 0.0, arrived[-1]
    for index, size in enumerate(sizes):
        share = UP_SHARE if index == 0 and num_chunks > 1 else 1.0
        up_free = max(arrived[index], up_free) + share * costs.up.seconds(size)
        down_free = max(up_free, down_free) + costs.down.seconds(size)
        exchange_free = max(exchange_free, down_free) + costs.combine.seconds(size)
    return max(exchange_free, costs.host.seconds(num_chunks))


def _chunk_sizes(num_tokens: int, num_chunks: int) -> list[int]:
    size, larger = divmod(num_tokens, num_chunks)
    return [size + (index < larger) for index in range(num_chunks)]


def _weight(seconds: float) -> float:
    return max(seconds, _CLOCK_SECONDS) ** -2


def _line(points: Sequence[tuple[int, float]]) -> StageCost:
    """The unbounded least squares line."""
    weights = [_weight(seconds) for _, seconds in points]
    total = sum(weights)
    mean_tokens = sum(w * n for w, (n, _) in zip(weights, points, strict=True)) / total
    mean_seconds = sum(w * s for w, (_, s) in zip(weights, points, strict=True)) / total
    rows = [
        (w, n - mean_tokens, s - mean_seconds) for w, (n, s) in zip(weights, points, strict=True)
    ]
    beta = sum(w * n * s for w, n, s in rows) / sum(w * n * n for w, n, _ in rows)
    return StageCost(mean_seconds - beta * mean_tokens, beta)


def _through_origin(points: Sequence[tuple[int, float]]) -> StageCost:
    products = sum(_weight(s) * n * s for n, s in points)
    return StageCost(0.0, products / sum(_weight(s) * n * n for n, s in points))


def _constant(points: Sequence[tuple[int, float]]) -> StageCost:
    total = sum(_weight(s) for _, s in points)
    return StageCost(sum(_weight(s) * s for _, s in points) / total, 0.0)


def _error(cost: StageCost, points: Sequence[tuple[int, float]]) -> float:
    return sum(_weight(s) * (cost.seconds(n) - s) ** 2 for n, s in points)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
