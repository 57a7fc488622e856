"""How much each rank holds: replicas and KV blocks from the memory there is. Pure arithmetic."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from lightmoe.errors import MachineError
from lightmoe.models.config import ModelConfig
from lightmoe.moe.placement import Placement, initial_placement
from lightmoe.worker.config import BLOCK_SIZE

_GIB = 1 << 30
_MAX_CPU_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What was decided. Sizes in bytes, of the fullest rank."""

    placement: Placement
    max_model_len: int
    num_kv_blocks: int
    weight_bytes: int
    cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a launch asks; `rank_bytes` is what one rank may use for weights and cache.

    `num_free_slots` a rank stay empty, for experts on their way.
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


def size_ranks(demand: Demand) -> Sizing:
    """Placement and cache that fit `rank_bytes`; MachineError with the numbers if nothing does.

    Homes come first, then one sequence's cache, then replicas, at most one more copy of every
    expert, then the rest of the cache.
    """
    model = demand.model
    expert_bytes = model.expert_elements * demand.element_bytes
    dense_bytes = model.dense_elements * demand.element_bytes
    block_bytes = _block_bytes(demand)
    blocks_per_sequence = -(-demand.max_model_len // BLOCK_SIZE)

    def fits(placement: Placement) -> bool:
        slots = _max_slots(placement) + demand.num_free_slots
        need = slots * expert_bytes + dense_bytes + blocks_per_sequence * block_bytes
        return need <= demand.rank_bytes

    placement = _place(demand, 0)
    if not fits(placement):
        raise _too_small(
            demand, placement, expert_bytes, dense_bytes, block_bytes, blocks_per_sequence
        )
    # Replicas need a rank other than the home, and pay from the size at which spares are the rule.
    most = model.num_experts if demand.num_spares or demand.num_ranks >= 4 else 0
    # More replicas never make the fullest rank smaller, so the most that fit can be bisected.
    replicas = bisect.bisect(range(1, most + 1), False, key=lambda n: not fits(_place(demand, n)))
    if replicas:
        placement = _place(demand, replicas)
    slots = _max_slots(placement) + demand.num_free_slots
    weight_bytes = slots * expert_bytes + dense_bytes
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
    slots = _max_slots(placement) + demand.num_free_slots
    weights = slots * expert_bytes + dense_bytes
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
        f"the weights need {_size(weights)} on a rank ({slots} experts"
        f"{_of_them_free(demand)} and the dense layers), {have};"
        " use more ranks (--gpus), a smaller model or more memory"
    )


def _of_them_free(demand: Demand) -> str:
    return f", {demand.num_free_slots} of them --free-slots," if demand.num_free_slots else ""


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:.1f} MiB"
