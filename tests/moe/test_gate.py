"""Gate, load counter and experts: what one rank computes by itself."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import silu

from lightmoe.kernels import PairGroups
from lightmoe.moe.dispatch import Receipt
from lightmoe.moe.experts import Experts, SlotPool
from lightmoe.moe.gate import Choice, Gate
from lightmoe.moe.load import LoadCounter
from lightmoe.quant.packing import ExpertLayout
from tests.moe.cases import LayerWeights, placement_of

CPU = torch.device("cpu")


def test_gate_weights_sum_to_its_scale_when_renormalised() -> None:
    weights = LayerWeights.random(0, num_experts=7, num_per_token=3, width=20, expert_width=8)
    hidden = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))

    choice = Gate(weights.router, 3, renormalize=True, scale=2.5)(hidden)

    assert choice.experts.shape == choice.weights.shape == (5, 3)
    torch.testing.assert_close(choice.weights.sum(dim=1), torch.full((5,), 2.5))


def test_load_counts_each_layer_and_starts_again_when_taken() -> None:
    load = LoadCounter(num_layers=2, num_experts=4, device=CPU)
    nobody = torch.empty(0, 2)

    load.add(0, Choice(torch.tensor([[0, 3], [3, 1]]), nobody))
    load.add(1, Choice(torch.tensor([[2, 1]]), nobody))
    load.add(0, Choice(torch.tensor([[3, 2]]), nobody))
    load.add(1, Choice(torch.empty(0, 2, dtype=torch.int64), nobody))

    counts = load.take()
    assert counts.dtype == np.int32
    assert counts.tolist() == [[1, 1, 1, 3], [0, 1, 1, 0]]
    assert load.take().sum() == 0
    assert counts.sum() == 8


def test_experts_compute_every_pair_with_its_slots_weights() -> None:
    weights = LayerWeights.random(2, num_experts=3, num_per_token=1, width=12, expert_width=20)
    layout = ExpertLayout(12, 20)
    pool = SlotPool(4, layout, torch.float32, CPU)
    expert_of_slot = [2, 0, 1, 0]
    for slot, expert in enumerate(expert_of_slot):
        layout.write(
            pool.blobs[slot], weights.gates[expert], weights.ups[expert], weights.downs[expert]
        )
    rows = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    pair_row, pair_slot = [4, 0, 0, 1, 2, 3], [0, 0, 2, 2, 2, 3]
    receipt = Receipt(
        tokens=slice(0, 5),
        pair_row=torch.tensor(pair_row),
        groups=PairGroups.from_counts([0, 2, 3], [2, 3, 1]),
        pair_index=torch.empty(0),
    )

    pairs = Experts(pool)(rows, receipt)

    for pair, row, slot in zip(pairs, pair_row, pair_slot, strict=True):
        expert = expert_of_slot[slot]
        inner = silu(weights.gates[expert] @ rows[row]) * (weights.ups[expert] @ rows[row])
        torch.testing.assert_close(pair, weights.downs[expert] @ inner)


def test_a_pool_is_one_allocation_of_whole_experts() -> None:
    placement = placement_of([[[0], [1]], [[1], [0]]], num_ranks=2)
    pool = SlotPool(placement.num_slots(0), ExpertLayout(6, 10), torch.float32, CPU)

    assert pool.num_bytes == 2 * 3 * 6 * 10 * 4
    assert pool.gate_up.shape == (2, 20, 6)
    assert pool.down.shape == (2, 6, 10)
    assert pool.gate_up.untyped_storage().data_ptr() == pool.down.untyped_storage().data_ptr()
