"""How much each rank holds: replicas and KV blocks from the memory there is. Pure arithmetic."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from lightmoe.errors import MachineError, UsageError
from lightmoe.models.config import ModelConfig
from lightmoe.moe.placement import Placement, initial_placement
from lightmoe.worker.config import BLOCK_SIZE

_GIB = 1 << 30
_MAX_CPU_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What was decided. Sizes in bytes, of the fullest rank.

    `num_slots` are those of its experts; where there are fewer than experts, `host_bytes` is what
    all ranks together keep in the host's memory. On CPUs their weights include it.
    """

    placement: Placement
    max_model_len: int
    num_kv_blocks: int
    weight_bytes: int
    cache_bytes: int
    num_slots: int
    host_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a launch asks; `rank_bytes` is what one rank may use for weights and cache.

    `num_free_slots` a rank stay empty, for experts on their way. With `expert_slots` a rank has so
    many slots, and its experts take turns in them; None: each has its own.
    """

    model: ModelConfig
    num_ranks: int
    num_spares: int
    element_bytes: int
    rank_bytes: int
    max_model_len: int
    max_num_seqs: int
    on_cpu: bool
    num_free_slots: int = 0
    expert_slots: int | None = None


def size_ranks(demand: Demand) -> Sizing:
    """Placement and cache that fit `rank_bytes`; MachineError with the numbers if nothing does.

    Homes come first, then one sequence's cache, then replicas, at most one more copy of every
    expert, then the rest of the cache. UsageError for fewer `expert_slots` than a layer may need.
    """
    model = demand.model
    expert_bytes = model.expert_elements * demand.element_bytes
    dense_bytes = model.dense_elements * demand.element_bytes
    block_bytes = _block_bytes(demand)
    blocks_per_sequence = -(-demand.max_model_len // BLOCK_SIZE)

    def fits(placement: Placement) -> bool:
        weights = _num_blobs(demand, placement) * expert_bytes + dense_bytes
        return weights + blocks_per_sequence * block_bytes <= demand.rank_bytes

    placement = _place(demand, 0)
    _check_expert_slots(demand, placement)
    if not fits(placement):
        raise _too_small(
            demand, placement, expert_bytes, dense_bytes, block_bytes, blocks_per_sequence
        )
    # Replicas need a rank other than the home, and pay from the size at which spares are the rule.
    most = model.num_experts if demand.num_spares or demand.num_ranks >= 4 else 0
    if demand.expert_slots is not None:
        most = 0
    # More replicas never make the fullest rank smaller, so the most that fit can be bisected.
    replicas = bisect.bisect(range(1, most + 1), False, key=lambda n: not fits(_place(demand, n)))
    if replicas:
        placement = _place(demand, replicas)
    weight_bytes = _num_blobs(demand, placement) * expert_bytes + dense_bytes
    budget = demand.rank_bytes - weight_bytes
    if demand.on_cpu:
        # Other programs want the rest of the machine's memory.
        budget = min(budget, max(_MAX_CPU_CACHE_BYTES, blocks_per_sequence * block_bytes))
    num_blocks = min(budget // block_bytes, demand.max_num_seqs * blocks_per_sequence)
    return Sizing(
        placement=placement,
        max_model_len=demand.max_model_len,
        num_kv_blocks=num_blocks,
        weight_bytes=weight_bytes,
        cache_bytes=num_blocks * block_bytes,
        num_slots=_num_slots(demand, placement),
        host_bytes=_num_in_host(demand, placement) * expert_bytes,
    )


def slots_that_fit(demand: Demand) -> int | None:
    """The most slots of a rank beside the dense layers and one sequence's cache.

    None where each expert would have one, or where they would not do for one layer's experts.
    """
    blocks = -(-demand.max_model_len // BLOCK_SIZE)
    dense_bytes = demand.model.dense_elements * demand.element_bytes
    left = demand.rank_bytes - dense_bytes - blocks * _block_bytes(demand)
    slots = left // (demand.model.expert_elements * demand.element_bytes)
    placement = _place(demand, 0)
    return slots if _fullest_layer(placement) <= slots < _max_slots(placement) else None


def _num_slots(demand: Demand, placement: Placement) -> int:
    """Slots of the fullest rank."""
    if demand.expert_slots is not None:
        return min(demand.expert_slots, _max_slots(placement))
    return _max_slots(placement) + demand.num_free_slots


def _num_in_host(demand: Demand, placement: Placement) -> int:
    """Experts in the host's memory, of all ranks: a slot's content has its original there."""
    if demand.expert_slots is None:
        return 0
    return sum(placement.num_slots(rank) for rank in range(placement.num_ranks))


def _num_blobs(demand: Demand, placement: Placement) -> int:
    """Experts that the fullest rank's memory has room for: on a CPU the host's is the same."""
    also_there = demand.on_cpu and demand.expert_slots is not None
    return _num_slots(demand, placement) + (_max_slots(placement) if also_there else 0)


def _fullest_layer(placement: Placement) -> int:
    """Most experts that a rank holds of one layer."""
    return int((placement.slot_table >= 0).sum(axis=1).max())


def _check_expert_slots(demand: Demand, placement: Placement) -> None:
    least = _fullest_layer(placement)
    if demand.expert_slots is not None and demand.expert_slots < least:
        raise UsageError(
            f"expert_slots is {demand.expert_slots}, and a rank holds {least} experts of one layer,"
            f" all of which a step may choose; give at least {least}, or more ranks (--gpus)"
        )
    most = _max_slots(placement)
    if demand.expert_slots is not None and demand.expert_slots > most:
        raise UsageError(
            f"expert_slots is {demand.expert_slots}, and a rank has {most} experts at most; leave"
            " it out: then all of them have slots where they fit"
        )


def _place(demand: Demand, replicas_per_layer: int) -> Placement:
    return initial_placement(
        len(demand.model.moe_layers),
        demand.model.num_experts,
        demand.num_ranks,
        num_spares=demand.num_spares,
        replicas_per_layer=replicas_per_layer,
    )


def _max_slots(placement: Placement) -> int:
    return max(placement.num_slots(rank) for rank in range(placement.num_ranks))


def _block_bytes(demand: Demand) -> int:
    return demand.model.cache_elements_per_position * BLOCK_SIZE * demand.element_bytes


def _too_small(
    demand: Demand,
    placement: Placement,
    expert_bytes: int,
    dense_bytes: int,
    block_bytes: int,
    blocks_per_sequence: int,
) -> MachineError:
    num_blobs = _num_blobs(demand, placement)
    weights = num_blobs * expert_bytes + dense_bytes
    left = demand.rank_bytes - weights
    have = f"a rank may use {_size(demand.rank_bytes)}"
    if left >= block_bytes:
        longest = left // block_bytes * BLOCK_SIZE
        return MachineError(
            f"one sequence of {demand.max_model_len} tokens needs"
            f" {_size(blocks_per_sequence * block_bytes)} of KV cache beside"
            f" {_size(weights)} of weights, {have}; give --max-model-len {longest}"
        )
    return MachineError(
        f"the weights need {_size(weights)} on a rank ({num_blobs} experts"
        f"{_which_of_them(demand)} and the dense layers), {have};"
        " use more ranks (--gpus), a smaller model or more memory"
    )


def _which_of_them(demand: Demand) -> str:
    if demand.expert_slots is not None and demand.on_cpu:
        return ", those of --expert-slots and a copy of each,"
    return f", {demand.num_free_slots} of them --free-slots," if demand.num_free_slots else ""


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:.1f} MiB"
