"""Load in, placement out: homes packed by load, replicas where the skew is, few moves.

A further replica lowers the load per copy of its expert, so the next one always goes where a copy
carries most: the divisor method of Jefferson, over all layers at once, so that a layer's share of
the slots follows its skew. A layer stays as it is unless another placement promises a lower maximum
under loads that have drifted from those seen; where other replicas do, its homes stay.

Shapes: L layers, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightmoe.balancer.batched_routes import copy_table, least_maximum, waterfill_loads
from lightmoe.balancer.packing import Packing, fill_free_slots, in_order
from lightmoe.balancer.planning_task import PlanningTask
from lightmoe.moe.placement import Placement

MIN_GAIN = 0.01
"""A layer is planned anew where its maximum is expected to fall by this share at least."""

DRIFT = 0.2
"""Standard deviation of the logarithm of an expert's load between the plan and its use."""

NUM_PREDICTIONS = 256
"""Drifted loads that are predicted from, of all layers together, but at least four of each."""

STAY = 0.1
"""A copy stays where it was though the rank is fuller by this share of the mean rank's load."""

LIGHT = 0.25
"""So much of the mean rank's load, in its coldest experts, may a layer leave to another's ranks."""

OTHER_NODE = 0.02
"""A replica goes to a node without a copy though the rank is fuller by this share of the mean."""

OTHER_LINK = 0.25
"""How much of what links a home to a rank already counts as load there, for its next replica."""

_MAX_RANKS_OF_PREDICTED_OPTIMUM = 12
_TOKENS_OF_PREDICTION = 1 << 20


def plan(
    load: np.ndarray,
    slots_per_rank: Sequence[int],
    *,
    num_spares: int,
    previous: Placement | None = None,
    rank_speeds: Sequence[float] | None = None,
    rank_nodes: Sequence[int] | None = None,
    min_gain: float = MIN_GAIN,
) -> Placement:
    """The placement for these loads; its epoch is the previous one's plus one, or zero.

    `load` [L, E] counts tokens, on any scale; `slots_per_rank` [W] are the pools, all layers
    together. The last `num_spares` ranks hold replicas only and the others homes only; without
    spares all ranks hold both. `rank_speeds` [W] are relative; ranks of one node have the same
    number in `rank_nodes` [W]. PlacementError where the homes do not fit or a value makes no sense.
    """
    task = PlanningTask.of(load, slots_per_rank, num_spares, previous, rank_speeds, rank_nodes)
    no_layer = np.zeros(len(load), dtype=bool)
    if not task.fits_before:
        homes = pack_homes(task, no_layer, no_layer)
        return task.placement(pack_replicas(task, homes, no_layer), homes)
    homes_before = task.homes_before
    homes = pack_homes(task, no_layer, no_layer)
    now = predict(task, task.held_before, homes_before)
    other_replicas = predict(task, pack_replicas(task, homes_before, no_layer), homes_before)
    all_new = predict(task, pack_replicas(task, homes, no_layer), homes)
    stays = now <= (1 + min_gain) * np.minimum(other_replicas, all_new)
    homes_stay = stays | (other_replicas <= (1 + min_gain) * all_new)
    homes = pack_homes(task, stays, homes_stay)
    return task.placement(pack_replicas(task, homes, stays), homes)


def pack_homes(task: PlanningTask, stays: np.ndarray, homes_stay: np.ndarray) -> np.ndarray:
    """A home for every expert: int32 [L, E].

    Layers of `stays` bool [L] keep all their copies, those of `homes_stay` bool [L] their homes.
    """
    homes = np.where(homes_stay[:, None], task.homes_before, -1)
    held = task.held_before & stays[:, None, None]
    layers = np.flatnonzero(homes_stay)
    held[layers[:, None], np.arange(homes.shape[1]), homes[layers]] = True
    loads = task.shares
    if not task.num_spares:
        # Without spares the replicas take their part of the load to other homes.
        loads = loads / count_copies(task, task.num_replica_slots - loads.size, stays)
    order = np.argsort(-loads, axis=1, kind="stable")
    sorted_loads = np.take_along_axis(loads, order, axis=1)
    order[homes_stay] = -1
    packing = _packing(task, held, ~task.is_spare)
    least = _least_homes(loads, packing.left) * ~homes_stay[:, None]
    ranks = packing.place(order, sorted_loads, least)
    moved = np.flatnonzero(~homes_stay)
    homes[moved[:, None], order[moved]] = ranks[moved]
    return homes.astype(np.int32)


def _least_homes(loads: np.ndarray, left: np.ndarray) -> np.ndarray:
    """How many homes of each layer each rank gets at least: int64 [L, W].

    Its part of the pools, less the coldest experts that together weigh little.
    """
    num_experts = loads.shape[1]
    coldest = np.sort(loads, axis=1).cumsum(axis=1)
    num_free = (coldest <= LIGHT / len(left)).sum(axis=1)
    fair = num_experts * left // max(1, int(left.sum()))
    return np.asarray(np.maximum(fair - num_free[:, None], 0))


def count_copies(task: PlanningTask, num_replicas: int, stays: np.ndarray) -> np.ndarray:
    """How many copies each expert gets: int64 [L, E], at least one; one in layers of `stays`."""
    num_before = task.held_before.sum(axis=2)
    divisors = np.arange(1, max(2, int(task.takes_replicas.sum()) + (task.num_spares > 0)))
    # Of equal experts the first, in every layer alike.
    shares = task.shares * (1 - 1e-9 * np.arange(task.shares.shape[1])) * ~stays[:, None]
    value = shares[:, :, None] / np.where(
        divisors < num_before[:, :, None], divisors / (1 + STAY), divisors
    )
    num_chosen = min(num_replicas, len(divisors) * int((shares > 0).sum()))
    if not num_chosen:
        return np.ones(shares.shape, dtype=np.int64)
    chosen = np.argpartition(-value, num_chosen - 1, axis=None)[:num_chosen]
    return 1 + np.bincount(chosen // len(divisors), minlength=shares.size).reshape(shares.shape)


def pack_replicas(task: PlanningTask, homes: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """Homes [L, E] and as many replicas as fit: bool [L, E, W].

    Layers of `stays` bool [L] are as they were.
    """
    held = task.held_before & stays[:, None, None]
    np.put_along_axis(held, homes[:, :, None].astype(np.int64), True, axis=2)
    packing = _packing(task, held, task.takes_replicas)
    copies = count_copies(task, int(packing.left.sum()), stays)
    each = task.shares / copies
    if not task.num_spares:
        packing.rank_load[:] += task.rank_loads(each, homes)
    packing.homes, packing.link_weight = homes, OTHER_LINK
    packing.place(*in_order(copies - 1, each))
    fill_free_slots(packing.held, task.shares, packing.left)
    return packing.held


def _packing(task: PlanningTask, held: np.ndarray, ranks: np.ndarray) -> Packing:
    """What is left of the pools of `ranks` bool [W] beside `held` bool [L, E, W]."""
    num_layers, _, num_ranks = held.shape
    same_node = task.rank_nodes[:, None] == task.rank_nodes
    crowding = OTHER_NODE / num_ranks * (same_node & ~same_node.all())
    # Equal ranks take turns, or the first would get the hottest expert of every layer.
    turns = (np.arange(num_ranks) - np.arange(num_layers)[:, None]) % num_ranks
    return Packing(
        held=held,
        rank_load=1e-9 * turns,
        left=np.where(ranks, task.pools - held.sum(axis=(0, 1)), 0),
        attraction=task.held_before * (STAY / num_ranks),
        crowding=crowding,
        rank_speeds=task.rank_speeds,
    )


def predict(task: PlanningTask, held: np.ndarray, homes: np.ndarray) -> np.ndarray:
    """The mean over drifted loads of the least maximum over the mean load: float64 [L]."""
    num_ranks = len(task.pools)
    generator = np.random.default_rng(0)
    num_drifts = max(4, NUM_PREDICTIONS // len(held))
    drift = np.exp(DRIFT * generator.standard_normal((num_drifts, *task.shares.shape)))
    loads = (task.shares * drift).reshape(-1, drift.shape[2])
    loads /= loads.sum(axis=1, keepdims=True)
    table = np.concatenate([copy_table(held, homes)] * num_drifts)
    if num_ranks <= _MAX_RANKS_OF_PREDICTED_OPTIMUM:
        maximum = least_maximum(loads, table, num_ranks, task.rank_speeds)
    else:
        tokens = (loads * _TOKENS_OF_PREDICTION).astype(np.int64)
        filled = waterfill_loads(tokens, table, num_ranks) / task.rank_speeds
        maximum = filled.max(axis=1) / _TOKENS_OF_PREDICTION
    return np.asarray(num_ranks * maximum.reshape(num_drifts, -1).mean(axis=0))
