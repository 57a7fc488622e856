"""The routes of moe/route.py over many problems at once, and the least maximum any route can reach.

A problem is one layer in one step. Offline there are thousands, alike in shape, so each step of
the water-filling runs over all of them; the loads equal those of `route_waterfill`, token by token.

Shapes: N problems, E experts, W ranks, C copies of the expert that has most.
"""

from __future__ import annotations

import numpy as np

from lightmoe.errors import UsageError
from lightmoe.moe.route import NUM_SWEEPS

MAX_RANKS_OF_OPTIMUM = 16
"""The optimum looks at every set of ranks: 65,535 of 16."""

_CELLS_PER_BLOCK = 1 << 16
_FAR_ABOVE = np.int64(1) << 60


def copy_table(held: np.ndarray, homes: np.ndarray) -> np.ndarray:
    """Which ranks hold each expert, home first, then ascending: int64 [L, E, C], W for none.

    `held` bool [L, E, W]; `homes` int [L, E].
    """
    num_ranks = held.shape[2]
    key = np.where(held, np.arange(num_ranks), num_ranks)
    np.put_along_axis(key, homes[:, :, None].astype(np.int64), -1, axis=2)
    key.sort(axis=2)
    key[:, :, 0] = homes
    width = int(held.sum(axis=2).max(initial=1))
    return key[:, :, :width]


def home_loads(tokens: np.ndarray, copies: np.ndarray, num_ranks: int) -> np.ndarray:
    """`--route none`: tokens int [N, E], copies [N, E, C] -> loads int64 [N, W]."""
    shares = np.zeros(copies.shape, dtype=np.int64)
    shares[:, :, 0] = tokens
    return _rank_loads(shares, copies, num_ranks)


def even_loads(tokens: np.ndarray, copies: np.ndarray, num_ranks: int) -> np.ndarray:
    """`--route even`: tokens int [N, E], copies [N, E, C] -> loads int64 [N, W]."""
    is_copy = copies < num_ranks
    each, rest = np.divmod(tokens, is_copy.sum(axis=2))
    shares = each[:, :, None] + (np.arange(copies.shape[2]) < rest[:, :, None])
    return _rank_loads(np.where(is_copy, shares, 0), copies, num_ranks)


def _rank_loads(shares: np.ndarray, copies: np.ndarray, num_ranks: int) -> np.ndarray:
    num_problems = len(shares)
    cells = np.arange(num_problems)[:, None, None] * (num_ranks + 1) + copies
    size = num_problems * (num_ranks + 1)
    loads = np.bincount(cells.ravel(), weights=shares.ravel(), minlength=size)
    return loads.reshape(num_problems, -1)[:, :num_ranks].astype(np.int64)


def waterfill_loads(
    tokens: np.ndarray, copies: np.ndarray, num_ranks: int, sweeps: int = NUM_SWEEPS
) -> np.ndarray:
    """`--route waterfill`: tokens int [N, E], copies [N, E, C] -> loads int64 [N, W]."""
    copies = np.sort(copies, axis=2)
    num_copies = (copies < num_ranks).sum(axis=2)
    shares = np.zeros(copies.shape, dtype=np.int64)
    shares[:, :, 0] = np.where(num_copies == 1, tokens, 0)
    loads = np.zeros((len(tokens), num_ranks + 1), dtype=np.int64)
    loads[:, :num_ranks] = _rank_loads(shares, copies, num_ranks)
    pooled = _pooled(tokens, copies)
    pours = (num_copies > 1) & (pooled > 0)
    key = num_copies * (pooled.max(initial=0) + 1) - pooled
    order = np.argsort(np.where(pours, key, np.iinfo(np.int64).max), axis=1, kind="stable")
    num_pours = pours.sum(axis=1)
    # Problems with many pools to pour first: those in play are always a prefix.
    by_pours = np.argsort(-num_pours, kind="stable")
    shares[:, :, 0] = 0
    for _ in range(max(sweeps, 1)):
        changed = False
        for turn in range(int(num_pours.max(initial=0))):
            problems = by_pours[: int((num_pours > turn).sum())]
            experts = order[problems, turn]
            changed |= _pour_again(loads, shares, pooled, copies, problems, experts)
        if not changed:
            break
    return loads[:, :num_ranks]


def _pooled(tokens: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """The tokens of all experts of the same ranks at the first of them, 0 at the others [N, E]."""
    num_problems, num_experts = tokens.shape
    order = np.lexsort(tuple(copies.transpose(2, 0, 1)), axis=1)
    ordered = np.take_along_axis(copies, order[:, :, None], axis=1)
    begins = np.ones(order.shape, dtype=bool)
    begins[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).any(axis=2)
    begin = np.maximum.accumulate(np.where(begins, np.arange(num_experts), 0), axis=1)
    first = np.take_along_axis(order, begin, axis=1)
    cells = first + num_experts * np.arange(num_problems)[:, None]
    weights = np.take_along_axis(tokens, order, axis=1)
    pooled = np.bincount(cells.ravel(), weights=weights.ravel(), minlength=tokens.size)
    return pooled.reshape(tokens.shape).astype(np.int64)


def _pour_again(
    loads: np.ndarray,
    shares: np.ndarray,
    tokens: np.ndarray,
    copies: np.ndarray,
    problems: np.ndarray,
    experts: np.ndarray,
) -> bool:
    """Take one pool of each problem out of the loads [N, W + 1] and pour it level.

    Says whether anything changed.
    """
    ranks, share = copies[problems, experts], shares[problems, experts]
    is_none = ranks == loads.shape[1] - 1
    base = loads[problems[:, None], ranks] - share
    base[is_none] = _FAR_ABOVE
    level = _pour(base, tokens[problems, experts])
    shares[problems, experts] = level
    loads[problems[:, None], ranks] = np.where(is_none, 0, base + level)
    return not np.array_equal(level, share)


def _pour(base: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """moe/route.py's `pour` for base [N, C] and tokens [N]."""
    ground = np.sort(base, axis=1)
    filled = np.cumsum(np.where(ground < _FAR_ABOVE, ground, 0), axis=1) + tokens[:, None]
    levels, rests = np.divmod(filled, np.arange(1, base.shape[1] + 1))
    stops = np.ones(base.shape, dtype=bool)
    stops[:, :-1] = levels[:, :-1] < ground[:, 1:]
    last = stops.argmax(axis=1)[:, None]
    level = np.take_along_axis(levels, last, axis=1)
    is_reached = base <= level
    before = is_reached.cumsum(axis=1) - is_reached
    more = before < np.take_along_axis(rests, last, axis=1)
    return np.asarray(np.where(is_reached, level + more - base, 0))


def least_maximum(
    tokens: np.ndarray,
    copies: np.ndarray,
    num_ranks: int,
    rank_speeds: np.ndarray | None = None,
) -> np.ndarray:
    """`--route lp`: the lowest maximum load of any split, whole tokens or not: float64 [N].

    A rank's load counts over its speed, one where `rank_speeds` [W] says nothing.

    The reachable loads form a polymatroid: the tokens that cannot leave a set of ranks are those of
    the experts with every copy in it, and the maximum is the largest such number over the size of
    its set (Federgruen and Groenevelt 1986). UsageError for more than 16 ranks.
    """
    if num_ranks > MAX_RANKS_OF_OPTIMUM:
        raise UsageError(
            f"the optimum is for {MAX_RANKS_OF_OPTIMUM} ranks at most, not {num_ranks};"
            " leave the route lp out"
        )
    speeds = np.ones(num_ranks) if rank_speeds is None else rank_speeds
    block = max(1, _CELLS_PER_BLOCK >> num_ranks)
    parts = [
        _least_maximum(tokens[begin : begin + block], copies[begin : begin + block], speeds)
        for begin in range(0, len(tokens), block)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def _least_maximum(tokens: np.ndarray, copies: np.ndarray, rank_speeds: np.ndarray) -> np.ndarray:
    num_problems, num_ranks = len(tokens), len(rank_speeds)
    bits = np.where(copies < num_ranks, 1 << copies, 0).sum(axis=2)
    cells = bits * num_problems + np.arange(num_problems)[:, None]
    size = num_problems << num_ranks
    confined = np.bincount(cells.ravel(), weights=tokens.ravel(), minlength=size)
    speed_of_set = np.zeros(1)
    for rank, speed in enumerate(rank_speeds.tolist()):
        # Sets without this rank, and the same sets with it, side by side.
        pairs = confined.reshape(-1, 2, 1 << rank, num_problems)
        pairs[:, 1] += pairs[:, 0]
        speed_of_set = np.concatenate((speed_of_set, speed_of_set + speed))
    over_speed: np.ndarray = confined.reshape(-1, num_problems)[1:] / speed_of_set[1:, None]
    return np.asarray(over_speed.max(axis=0))
