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

UP_SHARE = 0.64
"""Of the experts' multiprocessors, for the first product where the second of as many other tokens
runs beside it: it has two thirds of the arithmetic, and the other takes a tenth longer over links
than at home."""

_CLOCK_SECONDS = 1e-6  # times below it are not told apart


def chunk_of(num_tokens: int, chunk: int, num_chunks: int) -> slice:
    """Tokens of one of the chunks. Of three or more the first and the last are half as large.

    Nothing hides the rows of the first, nor the results of the last.
    """
    begin, end = (_border(num_tokens, border, num_chunks) for border in (chunk, chunk + 1))
    return slice(begin, end)


def _border(num_tokens: int, chunk: int, num_chunks: int) -> int:
    if chunk in (0, num_chunks):
        return num_tokens if chunk else 0
    return num_tokens * (2 * chunk - 1) // (2 * num_chunks - 2)


def share_of_up(of_alike: float, chunk: int, num_chunks: int) -> float:
    """Share of the multiprocessors for the next chunk's first product beside this one's second.

    `of_alike` is that where both have as many tokens.
    """
    up = of_alike * _weight_of(chunk + 1, num_chunks)
    return up / (up + (1 - of_alike) * _weight_of(chunk, num_chunks))


def _weight_of(chunk: int, num_chunks: int) -> int:
    """A chunk's size, to others' of the same layer."""
    return 1 if num_chunks < 3 or chunk in (0, num_chunks - 1) else 2


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
    includes the exchange of the choice. `upload` is what hidden states take to where others read
    them: beside the gate and each other's stages, in the same chunks. `host` is what enqueuing the
    layer takes, by chunks instead of tokens: the device cannot be faster, but for what it does
    between two layers, while the host is ahead: `between`. `in_turn`: each product has all
    multiprocessors, else `up` is what it takes beside a `down` of as many tokens, with `up_share`
    of them. `put_off`: results are added up once the last second product has begun.
    """

    dispatch: StageCost
    up: StageCost
    down: StageCost
    combine: StageCost
    gate: StageCost = StageCost(0.0, 0.0)
    host: StageCost = StageCost(0.0, 0.0)
    between: StageCost = StageCost(0.0, 0.0)
    upload: StageCost = StageCost(0.0, 0.0)
    in_turn: bool = False
    put_off: bool = False
    up_share: float = UP_SHARE


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
    """How a layer overlaps: how many chunks, and how much of the device products have then.

    | field | meaning |
    |---|---|
    | num_chunks | so many; None: what the costs say |
    | costs | of the stages, fitted; None: no overlap |
    | halves_from | tokens of the fullest rank from which a step is cut in two; None: never |
    | expert_ctas | multiprocessors of the experts while an exchange runs beside; None: all |
    | up_share | of these, for a first product beside a second one of as many tokens |
    """

    num_chunks: int | None = 1
    costs: LayerCosts | None = None
    halves_from: int | None = None
    expert_ctas: int | None = None
    up_share: float = UP_SHARE

    @property
    def up_ctas(self) -> int | None:
        """Multiprocessors of the first product, beside a second one of as many tokens."""
        return self.ctas_beside(0, 2)[0]

    @property
    def down_ctas(self) -> int | None:
        """Multiprocessors of the second product, beside a first one of as many tokens."""
        return self.ctas_beside(0, 2)[1]

    def ctas_beside(self, chunk: int, num_chunks: int) -> tuple[int | None, int | None]:
        """Multiprocessors of a chunk's second product and of the next one's first: up, down."""
        if self.expert_ctas is None:
            return None, None
        up = round(share_of_up(self.up_share, chunk, num_chunks) * self.expert_ctas)
        return up, self.expert_ctas - up

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

    The exchange brings the rows of all chunks, each when it is uploaded, then their results, each
    when its down is done.
    """
    spans = [chunk_of(num_tokens, chunk, num_chunks) for chunk in range(num_chunks)]
    sizes = [span.stop - span.start for span in spans]
    uploaded = accumulate(map(costs.upload.seconds, sizes))
    free, arrived = costs.gate.seconds(num_tokens), []
    for size, there in zip(sizes, uploaded, strict=True):
        free = max(free, there) + costs.dispatch.seconds(size)
        arrived.append(free)
    up_free, down_free, downs = 0.0, 0.0, []
    for chunk, size in enumerate(sizes):
        share = costs.up_share
        if chunk:
            share /= share_of_up(costs.up_share, chunk - 1, num_chunks)
        beside = num_chunks > 1 and not costs.in_turn
        up_free = max(arrived[chunk], up_free, 0.0 if beside else down_free)
        up_free += costs.up.seconds(size) * (share if beside else 1.0)
        down_free = max(up_free, down_free) + costs.down.seconds(size)
        downs.append(down_free)
    for chunk, size in enumerate(sizes):
        ready = downs[max(chunk, num_chunks - 2)] if costs.put_off else downs[chunk]
        free = max(free, ready) + costs.combine.seconds(size)
    return max(free, costs.host.seconds(num_chunks) - costs.between.seconds(num_tokens))


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
