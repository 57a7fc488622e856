"""Which copy of its expert each (token, expert) pair goes to in this step.

Every rank computes the same route from the same counts, so nothing about it travels. What the
routes are, says kernels/route_reference.py; here is what CPU ranks call, and the choice between the
two objectives.

Shapes: T tokens of all ranks, E experts, K experts per token, W ranks, C copies of one expert.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import numpy as np

from lightmoe.kernels import host_route
from lightmoe.kernels.route_reference import (
    NUM_SWEEPS,
    ROUTES,
    Copies,
    Nearness,
    Shares,
    assign,
    pour,
    route_even,
    route_fewest,
    route_home,
    route_waterfill,
    share_tokens,
)
from lightmoe.kernels.tiles import PAIRS_TO_COMPUTE

__all__ = [
    "NUM_SWEEPS",
    "ROUTES",
    "Copies",
    "Nearness",
    "Objective",
    "Shares",
    "assign",
    "choose_objective",
    "copy_of_each",
    "copy_rank_table",
    "pair_ranks",
    "pour",
    "route_even",
    "route_fewest",
    "route_for",
    "route_home",
    "route_waterfill",
    "split_over_copies",
]

FEW_EXPERTS = 16
"""The route with the fewest active experts is searched for among so many: it takes that long."""

logger = logging.getLogger("lightmoe.route")


def split_over_copies(
    counts: np.ndarray,
    copies: Copies,
    route: str,
    sweeps: int = NUM_SWEEPS,
    nearness: Nearness = (),
) -> np.ndarray:
    """How many of each source's tokens of each expert go to each copy: [W, E] -> [W, E, C]."""
    path = host_route.library_path()
    if path is None:
        _say_that_it_is_slow()
        return assign(counts, copies, share_tokens(counts, copies, route, sweeps), nearness)
    return host_route.assign(counts, copy_rank_table(copies), route, sweeps, path, nearness)


@functools.cache
def _say_that_it_is_slow() -> None:
    """Once for each process."""
    logger.warning("no compiled route here: numpy computes it, slower; %s", host_route.REMEDY)


def copy_rank_table(copies: Copies) -> np.ndarray:
    """int32 [E, C]: the ranks of each expert's copies, then -1."""
    return _copy_ranks(tuple(map(tuple, copies)))


@functools.lru_cache(maxsize=1024)
def _copy_ranks(copies: tuple[tuple[int, ...], ...]) -> np.ndarray:
    width = max(map(len, copies))
    table = np.array([[*ranks, *[-1] * (width - len(ranks))] for ranks in copies], dtype=np.int32)
    table.flags.writeable = False
    return table


def pair_ranks(
    experts: np.ndarray,
    token_ranks: np.ndarray,
    copies: Copies,
    num_ranks: int,
    route: str,
    nearness: Nearness = (),
) -> np.ndarray:
    """The rank each pair goes to: experts [T, K], source rank of each token [T] -> ranks [T, K].

    Tokens of one source and expert take its copies in token order. Expert -1 goes to no rank, which
    is `num_ranks`.
    """
    chosen = experts >= 0
    if not chosen.all():
        with_none = np.full(experts.shape, num_ranks)
        sources = np.broadcast_to(token_ranks[:, None], experts.shape)[chosen]
        pairs = experts[chosen][:, None]
        with_none[chosen] = pair_ranks(pairs, sources, copies, num_ranks, route, nearness)[:, 0]
        return with_none
    num_experts = len(copies)
    num_per_token = experts.shape[1]
    key = (token_ranks[:, None] * num_experts + experts).ravel()
    counts = np.bincount(key, minlength=num_ranks * num_experts).reshape(num_ranks, num_experts)
    copy_ranks = copy_rank_table(copies).astype(np.int64)
    width = copy_ranks.shape[1]
    if width == 1 or not len(key):
        homes: np.ndarray = copy_ranks[experts, 0]
        return homes.reshape(-1, num_per_token)
    assigned = split_over_copies(counts, copies, route, nearness=nearness).reshape(-1, width)
    ranks: np.ndarray = copy_ranks[experts.ravel(), copy_of_each(key, assigned)]
    return ranks.reshape(-1, num_per_token)


def copy_of_each(key: np.ndarray, assigned: np.ndarray) -> np.ndarray:
    """The copy each pair takes, those of one key in order: key [P], assigned [keys, C] -> [P]."""
    borders = assigned.cumsum(axis=1)
    order = np.argsort(key, kind="stable")
    starts = np.concatenate(([0], borders[:, -1].cumsum()))
    position = np.empty_like(key)
    position[order] = np.arange(len(key)) - starts[key[order]]
    copies: np.ndarray = (position[:, None] >= borders[key]).sum(axis=1)
    return copies


@dataclass(frozen=True)
class Objective:
    """Which route a batch should take, "waterfill" or "fewest", and why, in one line."""

    route: str
    reason: str


def choose_objective(
    num_pairs: int,
    num_active_experts: int,
    *,
    flops_per_second: float,
    bytes_per_second: float,
    bytes_per_weight: float = 2.0,
) -> Objective:
    """Level tokens where computing is the bound, active experts where reading weights is.

    A weight that is read takes bytes_per_weight / bytes_per_second, its products with t tokens
    2 t / flops_per_second (Williams et al. 2009): up to so many tokens an expert costs the same.
    """
    if not num_pairs:
        return Objective("waterfill", "no tokens")
    tokens = num_pairs / num_active_experts
    border = bytes_per_weight * flops_per_second / (2 * bytes_per_second)
    if tokens < border:
        return Objective(
            "fewest", f"{tokens:.1f} tokens an active expert of {border:.1f}: bound by memory"
        )
    return Objective(
        "waterfill", f"{tokens:.1f} tokens an active expert of {border:.1f}: bound by computing"
    )


@functools.lru_cache(maxsize=1024)
def route_for(route: str, num_pairs: int, num_experts: int) -> str:
    """The route of one chunk on GPUs, water-filling only where the products compute.

    Where they read weights, a second copy of an expert that is read costs more than it levels: few
    experts get the fewest active ones per rank, many, nearly all of which are active, their home
    copy. The border is the products' own, PAIRS_TO_COMPUTE, as FLOPs a byte of 16-bit weights.
    """
    if route != "waterfill":
        return route
    objective = choose_objective(
        num_pairs, num_experts, flops_per_second=PAIRS_TO_COMPUTE, bytes_per_second=1
    )
    if objective.route == "waterfill":
        return route
    return "fewest" if num_experts <= FEW_EXPERTS else "none"
