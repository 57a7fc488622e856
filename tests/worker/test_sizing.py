"""What fits a rank: homes first, then one sequence, then replicas, then more cache."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightmoe.errors import MachineError, UsageError
from lightmoe.models.config import read_config
from lightmoe.worker.config import BLOCK_SIZE
from lightmoe.worker.sizing import Demand, Sizing, size_ranks, slots_that_fit
from tests.models.folders import write_config

GIB = 1 << 30


@pytest.fixture
def demand(tmp_path: Path) -> Demand:
    folder = write_config(
        tmp_path,
        hidden_size=256,
        intermediate_size=512,
        num_local_experts=8,
        num_hidden_layers=4,
        head_dim=32,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
        max_position_embeddings=4096,
    )
    return Demand(
        model=read_config(folder),
        num_ranks=10,
        num_spares=2,
        element_bytes=4,
        rank_bytes=GIB,
        max_model_len=512,
        max_num_seqs=16,
        on_cpu=True,
    )


def expert_bytes(demand: Demand) -> int:
    return 3 * 256 * 512 * demand.element_bytes


def dense_bytes(demand: Demand) -> int:
    attention = 2 * 256 * 256 + 2 * 128 * 256  # query, output; key, value
    per_layer = attention + 8 * 256 + 2 * 256  # router; norms
    return (4 * per_layer + 2 * 1000 * 256 + 256) * demand.element_bytes


def block_bytes(demand: Demand) -> int:
    return 2 * 4 * 4 * 32 * BLOCK_SIZE * demand.element_bytes


def num_replicas(sizing: Sizing) -> int:
    return sum(len(ranks) - 1 for ranks in sizing.placement.copies[0])


def needed(demand: Demand, slots: int) -> int:
    blocks = -(-demand.max_model_len // BLOCK_SIZE)
    return slots * expert_bytes(demand) + dense_bytes(demand) + blocks * block_bytes(demand)


def test_plenty_of_memory_gives_a_replica_of_everything_and_all_the_cache(demand: Demand) -> None:
    sizing = size_ranks(demand)

    assert sizing.placement.rank_kinds == ("home",) * 8 + ("spare",) * 2
    assert num_replicas(sizing) == 8
    assert sizing.num_kv_blocks == 16 * 512 // BLOCK_SIZE
    assert sizing.cache_bytes == sizing.num_kv_blocks * block_bytes(demand)
    # Four experts a layer on each of two spares, in four layers.
    assert sizing.weight_bytes == 16 * expert_bytes(demand) + dense_bytes(demand)
    assert sizing.weight_bytes + sizing.cache_bytes <= demand.rank_bytes


def test_replicas_shrink_with_memory_before_anything_is_refused(demand: Demand) -> None:
    found = []
    for slots in (16, 12, 8, 4):
        sizing = size_ranks(replace(demand, rank_bytes=needed(demand, slots)))
        assert sizing.weight_bytes + sizing.cache_bytes <= needed(demand, slots)
        assert sizing.num_kv_blocks >= 512 // BLOCK_SIZE
        found.append(num_replicas(sizing))

    assert found == [8, 6, 4, 2]
    # A home holds four experts, one a layer: with one byte less there is nothing left to give.
    with pytest.raises(MachineError):
        size_ranks(replace(demand, rank_bytes=needed(demand, 4) - 1))


def test_a_context_that_does_not_fit_is_refused_with_one_that_does(demand: Demand) -> None:
    tight = replace(demand, rank_bytes=needed(demand, 4) - 1)

    with pytest.raises(
        MachineError, match="sequence of 512 tokens needs 2.0 MiB of KV cache beside 11.0"
    ) as refused:
        size_ranks(tight)

    longest = re.search(r"give --max-model-len (\d+)$", str(refused.value))
    assert longest is not None
    assert int(longest[1]) == 512 - BLOCK_SIZE
    assert size_ranks(replace(tight, max_model_len=int(longest[1]))).num_kv_blocks == 31
    with pytest.raises(MachineError):
        size_ranks(replace(tight, max_model_len=int(longest[1]) + 1))


def test_weights_that_do_not_fit_are_refused_with_the_numbers(demand: Demand) -> None:
    with pytest.raises(
        MachineError,
        match=r"need 11\.0 MiB on a rank \(4 experts .* may use 10\.0 MiB; use more ranks",
    ):
        size_ranks(replace(demand, rank_bytes=10 << 20))


@pytest.mark.parametrize(("num_ranks", "replicas"), [(1, 0), (2, 0), (3, 0), (4, 8), (7, 8)])
def test_without_spares_replicas_begin_at_four_ranks(
    demand: Demand, num_ranks: int, replicas: int
) -> None:
    sizing = size_ranks(replace(demand, num_ranks=num_ranks, num_spares=0))

    assert num_replicas(sizing) == replicas
    assert "spare" not in sizing.placement.rank_kinds


def test_free_slots_are_paid_for_and_named_where_they_do_not_fit(demand: Demand) -> None:
    free = replace(demand, num_free_slots=2)

    assert size_ranks(free).weight_bytes == size_ranks(demand).weight_bytes + 2 * expert_bytes(
        demand
    )
    assert num_replicas(size_ranks(replace(free, rank_bytes=needed(demand, 14)))) == 6
    with pytest.raises(MachineError, match=r"\(6 experts, 2 of them --free-slots, and the dense"):
        size_ranks(replace(free, rank_bytes=10 << 20))


def test_with_fewer_slots_than_experts_the_rest_of_the_memory_is_cache(demand: Demand) -> None:
    tier = replace(demand, num_ranks=4, num_spares=0, on_cpu=False, expert_slots=3)

    sizing = size_ranks(tier)

    assert (sizing.num_slots, num_replicas(sizing)) == (3, 0)
    assert sizing.weight_bytes == 3 * expert_bytes(demand) + dense_bytes(demand)
    assert sizing.host_bytes == 32 * expert_bytes(demand)
    assert size_ranks(replace(tier, rank_bytes=needed(tier, 3))).num_kv_blocks == 512 // BLOCK_SIZE
    with pytest.raises(MachineError, match=r"3 experts and the dense"):
        size_ranks(replace(tier, rank_bytes=10 << 18))
    # On a CPU the host's memory is the rank's own.
    copies = (3 + 8) * expert_bytes(demand)
    assert size_ranks(replace(tier, on_cpu=True)).weight_bytes == copies + dense_bytes(demand)
    with pytest.raises(MachineError, match=r"11 experts, those of --expert-slots and a copy of"):
        size_ranks(replace(tier, on_cpu=True, rank_bytes=10 << 20))
    assert size_ranks(demand).host_bytes == 0


def test_slots_for_less_than_a_layer_are_refused_with_the_numbers(demand: Demand) -> None:
    tier = replace(demand, num_ranks=3, num_spares=0, expert_slots=2)

    with pytest.raises(UsageError, match=r"is 2, and a rank holds 3 experts .* give at least 3"):
        size_ranks(tier)
    assert size_ranks(replace(tier, expert_slots=3)).num_slots == 3


def test_how_many_slots_fit(demand: Demand) -> None:
    tier = replace(demand, num_ranks=4, num_spares=0, on_cpu=False)

    found = [
        slots_that_fit(replace(tier, rank_bytes=needed(tier, slots) + extra))
        for slots, extra in ((1, 0), (2, 0), (5, -1), (5, 0), (7, 0), (8, 0))
    ]

    # Two experts of each layer are here, eight in all.
    assert found == [None, 2, 4, 5, 7, None]


def test_a_cpu_rank_leaves_memory_to_others(demand: Demand) -> None:
    greedy = replace(demand, rank_bytes=100 * GIB, max_model_len=4096, max_num_seqs=1000)

    on_cpu, on_gpu = size_ranks(greedy), size_ranks(replace(greedy, on_cpu=False))

    assert on_cpu.cache_bytes <= GIB < on_gpu.cache_bytes
    assert on_gpu.num_kv_blocks == 1000 * 4096 // BLOCK_SIZE


def test_half_the_element_size_is_half_the_memory(demand: Demand) -> None:
    full, half = size_ranks(demand), size_ranks(replace(demand, element_bytes=2))

    assert half.weight_bytes * 2 == full.weight_bytes
    assert half.cache_bytes * 2 == full.cache_bytes
