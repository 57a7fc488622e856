"""Which copy of its expert each (token, expert) pair goes to, in plain Python: the specification of
the C++ and CUDA versions, which give the same integers.

Every rank computes the same route from the same counts, so nothing about it travels. The loads a
route can reach form a polymatroid: the split with the least sum of squares also has the least
maximum (Federgruen and Groenevelt 1986), and sweeps of exact water-filling reach it: take one pool
out, pour its tokens level over its ranks, next. A pool is all experts whose copies are on the same
ranks: what counts for the loads is how many tokens they have together.

Shapes: E experts, W ranks, C copies of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightmoe.kernels.groups import PairGroups

Copies = Sequence[Sequence[int]]
"""copies[expert]: the ranks that hold it, home first."""

Nearness = Sequence[Sequence[int]]
"""nearness[level][rank]: ranks of one number are near each other, the nearest level first."""

Shares = list[list[int]]
"""shares[expert][copy]: tokens of that expert that this copy gets."""

NUM_SWEEPS = 6
"""Within 0.2 % of the optimum in the mean, or a token; 64 converged on everything tried."""


def route_home(expert_tokens: Sequence[int], copies: Copies, num_ranks: int) -> Shares:
    """All tokens to the home copy (`--route none`)."""
    return [
        [tokens] + [0] * (len(ranks) - 1)
        for tokens, ranks in zip(expert_tokens, copies, strict=True)
    ]


def route_even(expert_tokens: Sequence[int], copies: Copies, num_ranks: int) -> Shares:
    """The same number of tokens to every copy, the remainder to the first ones (`--route even`)."""
    shares = []
    for tokens, ranks in zip(expert_tokens, copies, strict=True):
        each, rest = divmod(tokens, len(ranks))
        shares.append([each + (copy < rest) for copy in range(len(ranks))])
    return shares


@dataclass
class Pool:
    """Experts of the same ranks, ascending; share[i]: tokens of theirs that go to ranks[i]."""

    experts: list[int]
    ranks: list[int]
    tokens: int
    share: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.share = [0] * len(self.ranks)


def route_waterfill(
    expert_tokens: Sequence[int],
    copies: Copies,
    num_ranks: int,
    sweeps: int = NUM_SWEEPS,
    counts: np.ndarray | None = None,
) -> Shares:
    """The split with the least maximum over ranks (`--route waterfill`, the default).

    Pools with the fewest ranks come first, then those with most tokens, then those of the lowest
    expert; in the first sweep those that follow have no tokens anywhere yet. Which tokens of a pool
    go where does not matter for the loads: those of a rank's own (`counts` [W, E]) stay there.
    """
    pools = pools_of(expert_tokens, copies)
    rank_load = [0] * num_ranks
    for tokens, ranks in zip(expert_tokens, copies, strict=True):
        rank_load[ranks[0]] += tokens if len(ranks) == 1 else 0
    for _ in range(max(sweeps, 1)):
        changed = False
        for pool in pools:
            held = zip(pool.ranks, pool.share, strict=True)
            base = [rank_load[rank] - tokens for rank, tokens in held]
            level = pour(base, pool.tokens)
            changed |= level != pool.share
            pool.share = level
            for rank, ground, tokens in zip(pool.ranks, base, level, strict=True):
                rank_load[rank] = ground + tokens
        if not changed:
            break
    shares = route_home(expert_tokens, copies, num_ranks)
    for pool in pools:
        share_out(pool, shares, expert_tokens, copies, counts)
    return shares


def pools_of(expert_tokens: Sequence[int], copies: Copies) -> list[Pool]:
    """The pools with a choice and tokens, in the order of their turns."""
    by_ranks: dict[tuple[int, ...], Pool] = {}
    for expert, ranks in enumerate(copies):
        if len(ranks) > 1:
            key = tuple(sorted(ranks))
            pool = by_ranks.setdefault(key, Pool([], list(key), 0))
            pool.experts.append(expert)
            pool.tokens += expert_tokens[expert]
    return sorted(
        (pool for pool in by_ranks.values() if pool.tokens),
        key=lambda pool: (len(pool.ranks), -pool.tokens, pool.experts[0]),
    )


def pour(base: Sequence[int], tokens: int) -> list[int]:
    """Fill `tokens` into vessels whose ground stands at `base`, level to one token.

    Of those that the water reaches, the first ones have what is left over.
    """
    filled, level, rest = tokens, 0, 0
    for count, ground in enumerate(sorted(base), start=1):
        if count > 1 and ground > level:
            break
        filled += ground
        level, rest = divmod(filled, count)
    share = []
    for ground in base:
        is_reached = ground <= level
        share.append(level + (rest > 0) - ground if is_reached else 0)
        rest -= is_reached and rest > 0
    return share


def share_out(
    pool: Pool,
    shares: Shares,
    expert_tokens: Sequence[int],
    copies: Copies,
    counts: np.ndarray | None,
) -> None:
    """Make the shares of a pool's experts: tokens of its ranks stay, as far as the rank's reaches.

    The others fill what is left, in the order of experts and ranks.
    """
    room = dict(zip(pool.ranks, pool.share, strict=True))
    for expert in pool.experts:
        for copy, rank in enumerate(copies[expert]):
            own = 0 if counts is None else int(counts[rank, expert])
            shares[expert][copy] = min(own, room[rank])
            room[rank] -= shares[expert][copy]
    for expert in pool.experts:
        left = expert_tokens[expert] - sum(shares[expert])
        for rank in pool.ranks:
            moved = min(left, room[rank])
            shares[expert][copies[expert].index(rank)] += moved
            room[rank] -= moved
            left -= moved


def route_fewest(
    expert_tokens: Sequence[int],
    copies: Copies,
    num_ranks: int,
    sweeps: int = NUM_SWEEPS,
    counts: np.ndarray | None = None,
) -> Shares:
    """All tokens of an expert to one copy, so that no rank has many experts to read.

    The time of a memory-bound step is that of the most experts on one rank. Greedy, the expert with
    the fewest copies first, then the one with most tokens; further sweeps move what can be moved
    for the better. Ties go to the rank with most of the expert's tokens (`counts` [W, E]), then to
    the lowest one. At most one expert above the optimum on everything tried.
    """
    shares = [
        [tokens if len(ranks) == 1 else 0] + [0] * (len(ranks) - 1)
        for tokens, ranks in zip(expert_tokens, copies, strict=True)
    ]
    rank_experts = [0] * num_ranks
    for share, ranks in zip(shares, copies, strict=True):
        rank_experts[ranks[0]] += share[0] > 0
    replicated = sorted(
        (expert for expert, ranks in enumerate(copies) if len(ranks) > 1 and expert_tokens[expert]),
        key=lambda expert: (len(copies[expert]), -expert_tokens[expert], expert),
    )
    for _ in range(max(sweeps, 1)):
        changed = False
        for expert in replicated:
            share, ranks = shares[expert], copies[expert]
            others = [
                rank_experts[rank] - (tokens > 0) for rank, tokens in zip(ranks, share, strict=True)
            ]
            here = [0 if counts is None else int(counts[rank, expert]) for rank in ranks]
            best = min(range(len(ranks)), key=lambda copy: (others[copy], -here[copy], ranks[copy]))
            if not share[best]:
                changed = True
                shares[expert] = [
                    expert_tokens[expert] if copy == best else 0 for copy in range(len(ranks))
                ]
                for copy, rank in enumerate(ranks):
                    rank_experts[rank] = others[copy] + (copy == best)
        if not changed:
            break
    return shares


ROUTES: dict[str, Callable[[Sequence[int], Copies, int], Shares]] = {
    "waterfill": route_waterfill,
    "even": route_even,
    "none": route_home,
    "fewest": route_fewest,
}


def assign(
    counts: np.ndarray, copies: Copies, shares: Shares, nearness: Nearness = ()
) -> np.ndarray:
    """Which source ranks fill each share: [W, E] -> [W, E, C], summing to the counts over C.

    A token stays on its own rank where a copy there has room; the others fill what is left near
    them, level by level, then anywhere, in rank order. Where each level's groups lie within the
    next one's, as in a tree, nothing fills the shares with fewer pairs that leave a group.

    Rank order alone crosses in vain, also where ranks stand along the tree: on 10x2080ti-pcie with
    replicas on all ranks 28.5 % of the pairs with a choice leave their switch, not 23.6 (64
    experts; of mixtral-lite 41.6, not 25.0). Ranks and copies both in the order of the tree are as
    good for two groups, and up to 17 % worse for four (benchmarks/bench_nearest.py).
    """
    num_ranks, num_experts = counts.shape
    everyone = [0] * num_ranks
    width = max(len(ranks) for ranks in copies)
    assigned = np.zeros((num_ranks, num_experts, width), dtype=np.int64)
    for expert, ranks in enumerate(copies):
        if len(ranks) == 1:
            assigned[:, expert, 0] = counts[:, expert]
            continue
        sources: list[int] = counts[:, expert].tolist()
        room = list(shares[expert])
        for copy, rank in enumerate(ranks):
            here = min(sources[rank], room[copy])
            assigned[rank, expert, copy] = here
            sources[rank] -= here
            room[copy] -= here
        for groups in (*nearness, everyone):
            _meet(sources, ranks, room, groups, assigned[:, expert])
    return assigned


def _meet(
    sources: list[int],
    ranks: Sequence[int],
    room: list[int],
    groups: Sequence[int],
    assigned: np.ndarray,
) -> None:
    """Move what can from `sources` [W] and `room` [C] to `assigned` [W, C] within its group."""
    for source, left in enumerate(sources):
        if not left:
            continue
        for copy, places in enumerate(room):
            if places and groups[ranks[copy]] == groups[source]:
                moved = min(left, places)
                assigned[source, copy] += moved
                room[copy] -= moved
                left -= moved
                if not left:
                    break
        sources[source] = left


@dataclass(slots=True)
class RouteSplit:
    """Where every pair of all ranks goes, and what comes to this rank.

    | field | meaning |
    |---|---|
    | segments int32 [W, E, C, 2] | (end, base) of each source rank, expert and copy, see below |
    | groups | the pairs of this rank, group g = expert g, then source rank, then position |
    | rank_pairs int32 [W] | pairs of each rank |

    Of the pairs that a source rank has of an expert, those at positions from the `end` of the copy
    before (0 for the first) up to `end` go to this copy. The first of them lies at `base` among all
    pairs of the copy's rank. Copies that do not exist: (all pairs, 0), on GPUs anything.
    """

    segments: Tensor
    groups: PairGroups
    rank_pairs: Tensor


ChunkToSplit = tuple[str, int, int]
"""Of a chunk its route, the tokens of a tile, and the most pairs that a rank can get."""


def route_split(
    source_offsets: Tensor,
    copy_ranks: Tensor,
    slots: Tensor,
    tokens_per_tile: int,
    max_pairs: int,
    *,
    route: str,
    rank: int,
    sweeps: int = NUM_SWEEPS,
    nearness: Tensor | None = None,
) -> RouteSplit:
    """Split all ranks' pairs over the copies of their experts, as `rank` needs to know it.

    `source_offsets` int32 [W, E + 1] are each source rank's `PairGroups.offsets`, `copy_ranks`
    int32 [E, C] the holders of each expert, home first, then -1; `slots` int32 [E] those of this
    rank. `max_pairs` is the most that this rank can get; `nearness` int32 [N, W] is that of
    `assign`.
    """
    counts = source_offsets.long().diff(dim=1).numpy()
    copies = [[holder for holder in row if holder >= 0] for row in copy_ranks.tolist()]
    shares = share_tokens(counts, copies, route, sweeps)
    levels = () if nearness is None else nearness.tolist()
    segments, loads = lay_out(assign(counts, copies, shares, levels), copy_ranks.numpy())
    here = torch.from_numpy(loads[:, rank])
    tiles = -(-here // tokens_per_tile)
    experts = torch.arange(len(copies), dtype=torch.int32)
    groups = PairGroups(
        slots=slots,
        offsets=_exclusive(here),
        tile_offsets=_exclusive(tiles),
        tile_groups=experts.repeat_interleave(tiles),
        tokens_per_tile=tokens_per_tile,
        num_pairs=max_pairs,
    )
    return RouteSplit(segments, groups, torch.from_numpy(loads.sum(axis=0)).int())


def route_chunks(
    source_offsets: Tensor,
    copy_ranks: Tensor,
    slots: Tensor,
    chunks: Sequence[ChunkToSplit],
    *,
    rank: int,
    sweeps: int = NUM_SWEEPS,
    nearness: Tensor | None = None,
) -> list[RouteSplit]:
    """route_split of each chunk: source_offsets int32 [C, W, E + 1]."""
    return [
        route_split(
            offsets,
            copy_ranks,
            slots,
            tokens_per_tile,
            max_pairs,
            route=route,
            rank=rank,
            sweeps=sweeps,
            nearness=nearness,
        )
        for offsets, (route, tokens_per_tile, max_pairs) in zip(source_offsets, chunks, strict=True)
    ]


def share_tokens(counts: np.ndarray, copies: Copies, route: str, sweeps: int) -> Shares:
    """How many tokens each copy gets, from the counts of all ranks [W, E], by one of ROUTES."""
    tokens = counts.sum(axis=0).tolist()
    if route == "waterfill":
        return route_waterfill(tokens, copies, len(counts), sweeps, counts)
    if route == "fewest":
        return route_fewest(tokens, copies, len(counts), sweeps, counts)
    return ROUTES[route](tokens, copies, len(counts))


def lay_out(assigned: np.ndarray, copy_ranks: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Segments [W, E, C, 2] of what each source sends to each copy [W, E, C]; loads [E, W].

    A rank's pairs lie by expert, then source rank, then position among the source's pairs.
    """
    num_ranks, num_experts, width = assigned.shape
    exists = copy_ranks[:, :width] >= 0
    holders = np.where(exists, copy_ranks[:, :width], 0)
    expert = np.arange(num_experts)[:, None]
    loads = np.zeros((num_experts, num_ranks), dtype=np.int64)
    np.add.at(loads, (expert, holders), assigned.sum(axis=0))
    group_starts = loads.cumsum(axis=0) - loads
    sources_before = assigned.cumsum(axis=0) - assigned
    base = np.where(exists, group_starts[expert, holders] + sources_before, 0)
    segments = np.zeros((num_ranks, num_experts, copy_ranks.shape[1], 2), dtype=np.int32)
    segments[..., 0] = assigned.sum(axis=2)[:, :, None]
    segments[:, :, :width, 0] = assigned.cumsum(axis=2)
    segments[:, :, :width, 1] = base
    return torch.from_numpy(segments), loads


def _exclusive(counts: Tensor) -> Tensor:
    """Where each begins, and where the last ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
