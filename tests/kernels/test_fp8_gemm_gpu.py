"""fp8_gemm of liblight_ops against the reference: every tile, both kinds of scales, any company."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.errors import MachineError
from lightmoe.kernels import reference
from lightmoe.kernels.fp8_gemm import plan_fp8
from lightmoe.quant.fp8 import Fp8ExpertLayout, Fp8Matrix, Scaling
from tests.kernels.pairs import (
    AMPERE,
    COUNTS,
    Pairs,
    Road,
    architecture,
    assert_close,
    group_counts,
    on_road,
    on_two_streams,
    only_tile,
    poisoned_memory,
    random_experts,
    random_slots,
    random_tensor,
    sort_experts,
    tiles_of,
)
from tests.kernels.rows import random_rows

pytestmark = pytest.mark.gpu

SCALINGS: list[Scaling] = ["block", "channel"]
# Of the norm of a whole output. An fp8 mma keeps about 14 bits of its sums; rounding comes on top.
MOST_ERROR = {torch.bfloat16: 4e-3, torch.float16: 2e-3, torch.float32: 1.5e-3}


@pytest.fixture(autouse=True)
def _on_hopper(native: Road) -> None:
    if architecture() < 90:
        pytest.skip("e4m3 products are for compute capability 9.0")


@dataclass(frozen=True)
class Case:
    """Sizes of a layer: tokens, experts, experts of a token, model width, expert width."""

    tokens: int
    experts: int
    per_token: int
    width: int
    expert_width: int
    used_experts: int | None = None  # the others have no pairs

    def sort(self, tokens_per_tile: int) -> Pairs:
        experts = random_experts(self.tokens, self.used_experts or self.experts, self.per_token)
        slots = random_slots(self.experts, self.experts + 1)
        return sort_experts(experts, slots, tokens_per_tile)

    def matrices(self, scaling: Scaling) -> tuple[Fp8Matrix, Fp8Matrix]:
        return matrices_of(self.width, self.expert_width, scaling, self.experts + 1)

    def sort_for(self, experts: Fp8Matrix) -> Pairs:
        num_pairs = self.tokens * self.per_token
        return self.sort(kernels.tokens_per_tile(experts, num_pairs, self.experts))


@functools.cache
def matrices_of(
    width: int, expert_width: int, scaling: Scaling, num_slots: int
) -> tuple[Fp8Matrix, Fp8Matrix]:
    """Random experts in the slots of a pool on the GPU, each block of a size of its own."""
    layout = Fp8ExpertLayout(width, expert_width, scaling)
    blobs = torch.zeros(num_slots, layout.num_elements, dtype=torch.uint8)
    for slot, blob in enumerate(blobs):
        gate_up = random_rows(2 * expert_width, width, seed=slot) * width**-0.5
        down = random_rows(width, expert_width, seed=slot + 50) * expert_width**-0.5
        layout.write(blob, *uneven(gate_up).chunk(2), uneven(down))
    return layout.views(blobs.cuda())


def uneven(matrix: Tensor) -> Tensor:
    """Scales that a kernel cannot mistake for one another."""
    row = torch.arange(matrix.shape[0])[:, None] // 16
    column = torch.arange(matrix.shape[1]) // 128
    return matrix * (0.5 + (7 * row + 3 * column) % 11 / 8)


def quantized(rows: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Rows whose parts differ in size, in e4m3."""
    size = 0.5 + torch.arange(rows.shape[1], device=rows.device) // 128 % 3
    return kernels.permute_fp8(
        (rows * size).to(rows.dtype), group_size=128 if scaling == "block" else None
    )


def expected_product(
    rows: tuple[Tensor, Tensor],
    experts: Fp8Matrix,
    pairs: Pairs,
    row_index: Tensor | None = None,
    pair_weight: Tensor | None = None,
) -> Tensor:
    """The reference's, in float32 until the end."""
    return reference.fp8_gemm(
        *rows, experts, pairs.groups, row_index, dtype=torch.float32, pair_weight=pair_weight
    ).double()


CASES = [
    Case(1, 8, 2, 128, 64),
    Case(7, 5, 2, 64, 192),
    Case(33, 3, 3, 192, 128),
    Case(301, 7, 2, 320, 64, used_experts=5),
    Case(301, 4, 1, 64, 64, used_experts=1),  # all pairs of one expert
    Case(1000, 3, 1, 128, 320),
    Case(3, 8, 2, 1408, 512),
    Case(48, 7, 2, 512, 1408),
    Case(700, 3, 2, 2048, 768),
    Case(3000, 4, 1, 384, 256, used_experts=1),
    # No multiples of what a tile or a block of scales holds.
    Case(33, 3, 2, 144, 208),
    Case(7, 4, 2, 48, 16),
    Case(301, 2, 1, 16, 1040),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_products_are_the_reference_s(native: Road, scaling: Scaling, case: Case) -> None:
    gate_up, down = case.matrices(scaling)
    pairs = case.sort_for(gate_up)
    rows = quantized(random_tensor(case.tokens, case.width, dtype=native.dtype), scaling)
    num_pairs = case.tokens * case.per_token
    inner = quantized(random_tensor(num_pairs, case.expert_width, dtype=native.dtype), scaling)
    pair_weight = random_tensor(num_pairs, dtype=torch.float32, seed=3).abs()

    with poisoned_memory():
        gated = kernels.fp8_gemm(*rows, gate_up, pairs.groups, pairs.row_index, dtype=native.dtype)
        weighted = kernels.fp8_gemm(
            *inner, down, pairs.groups, dtype=native.dtype, pair_weight=pair_weight
        )
        whole = kernels.fp8_gemm(*inner, down, pairs.groups, dtype=torch.float32)

    assert gated.dtype == weighted.dtype == native.dtype
    expected = expected_product(rows, gate_up, pairs, pairs.row_index)
    assert_close(gated, expected, MOST_ERROR[native.dtype])
    expected = expected_product(inner, down, pairs, pair_weight=pair_weight)
    assert_close(weighted, expected, MOST_ERROR[native.dtype])
    assert_close(whole, expected_product(inner, down, pairs), MOST_ERROR[torch.float32])


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_tile_is_right_and_has_the_same_bits(
    native: Road, scaling: Scaling, gathered: bool
) -> None:
    case = Case(190, 4, 2, 400, 336, used_experts=3)
    num_rows = case.tokens if gathered else case.tokens * case.per_token
    for experts in case.matrices(scaling):
        rows = quantized(random_tensor(num_rows, experts.depth, dtype=native.dtype), scaling)
        made = []
        for tile in tiles_of(native.dtype, 8, 8):
            pairs = case.sort(tile.tokens)
            row_index = pairs.row_index if gathered else None
            with only_tile(tile), poisoned_memory():
                made.append(
                    kernels.fp8_gemm(*rows, experts, pairs.groups, row_index, dtype=native.dtype)
                )
            expected = expected_product(rows, experts, pairs, row_index)
            assert_close(made[-1], expected, MOST_ERROR[native.dtype])
        assert len(made) >= 3
        assert all(torch.equal(product, made[0]) for product in made)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_width_of_mma(native: Road, scaling: Scaling, gathered: bool) -> None:
    """Groups of all the counts, also none, by every tile, with few CTAs and with all."""
    layout = Case(1, len(COUNTS), 1, 272, 144)
    for experts in layout.matrices(scaling):
        rows = quantized(random_tensor(sum(COUNTS), experts.depth, dtype=native.dtype), scaling)
        slots = random_slots(len(COUNTS), len(COUNTS) + 1)
        for tile in tiles_of(native.dtype, 8, 8):
            pairs = group_counts(COUNTS, slots, tile.tokens)
            row_index = pairs.row_index if gathered else None
            with only_tile(tile), poisoned_memory():
                made = [
                    kernels.fp8_gemm(
                        *rows,
                        experts,
                        pairs.groups,
                        row_index,
                        dtype=native.dtype,
                        max_ctas=max_ctas,
                    )
                    for max_ctas in (None, 1, 5)
                ]
            expected = expected_product(rows, experts, pairs, row_index)
            assert_close(made[0], expected, MOST_ERROR[native.dtype])
            assert all(torch.equal(product, made[0]) for product in made)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_row_has_the_same_bits_in_any_company(native: Road, scaling: Scaling) -> None:
    case = Case(600, 3, 1, 320, 192)
    gate_up, _ = case.matrices(scaling)
    rows = quantized(random_tensor(case.tokens, case.width, dtype=native.dtype), scaling)
    choice = random_experts(case.tokens, case.experts, 1)
    slots = random_slots(case.experts, case.experts)

    def products_of(tokens: Tensor, tokens_per_tile: int) -> Tensor:
        pairs = sort_experts(choice[tokens], slots, tokens_per_tile)
        row_index = tokens.int()[pairs.row_index]
        product = kernels.fp8_gemm(*rows, gate_up, pairs.groups, row_index, dtype=native.dtype)
        return product[pairs.pair_index.flatten()]

    sizes = sorted({tile.tokens for tile in tiles_of(native.dtype, 8, 8)})
    together = products_of(torch.arange(case.tokens, device="cuda"), sizes[-1])
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(5)).cuda()
    for tokens_per_tile in sizes:
        for count in (1, 2, 7, 8, 9, 17, 33, 64, 65, 129, 300, 600):
            some = order[-count:]
            assert torch.equal(products_of(some, tokens_per_tile), together[some]), (
                tokens_per_tile,
                count,
            )


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_row_that_is_not_finite_spoils_nobody_else(native: Road, scaling: Scaling) -> None:
    case = Case(33, 3, 3, 192, 128)
    gate_up, _ = case.matrices(scaling)
    pairs = case.sort_for(gate_up)
    rows = random_tensor(case.tokens, case.width, dtype=native.dtype)
    spoilt = rows.clone()
    spoilt[5, 3], spoilt[32, 190] = torch.nan, torch.inf
    clean, product = (
        kernels.fp8_gemm(
            *quantized(some, scaling), gate_up, pairs.groups, pairs.row_index, dtype=native.dtype
        )
        for some in (rows, spoilt)
    )

    own = torch.isin(pairs.row_index, torch.tensor([5, 32], device="cuda"))
    assert product[own].isnan().all()
    assert torch.equal(product[~own], clean[~own])


@pytest.mark.parametrize("num_tokens", [3, 300])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_layer_s_kernels_follow_each_other(
    native: Road, scaling: Scaling, num_tokens: int
) -> None:
    """Each starts while the one before ends: the same bits as one after the other."""
    case = Case(num_tokens, 6, 2, 1024, 512)
    gate_up, down = case.matrices(scaling)
    pairs = case.sort_for(gate_up)
    hidden = random_tensor(case.tokens, case.width, dtype=native.dtype)
    group_size = 128 if scaling == "block" else None

    def layer(*, synchronize: bool) -> Tensor:
        rows = kernels.permute_fp8(hidden, pairs.row_index, group_size=group_size)
        if synchronize:
            torch.cuda.synchronize()
        inner = kernels.fp8_gemm(
            *rows, gate_up, pairs.groups, dtype=native.dtype, groups_settled=True
        )
        if synchronize:
            torch.cuda.synchronize()
        inner_rows = kernels.permute_fp8(inner, group_size=group_size)
        if synchronize:
            torch.cuda.synchronize()
        return kernels.fp8_gemm(
            *inner_rows, down, pairs.groups, dtype=native.dtype, groups_settled=True
        )

    serial = layer(synchronize=True)
    gathered = kernels.fp8_gemm(
        *kernels.permute_fp8(hidden, group_size=group_size),
        gate_up,
        pairs.groups,
        pairs.row_index,
        dtype=native.dtype,
    )
    permuted = kernels.permute_fp8(hidden, pairs.row_index, group_size=group_size)
    assert torch.equal(
        gathered, kernels.fp8_gemm(*permuted, gate_up, pairs.groups, dtype=native.dtype)
    )
    for _ in range(20):
        assert torch.equal(layer(synchronize=False), serial)
    for product in on_two_streams(lambda: layer(synchronize=False)):
        assert torch.equal(product, serial)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_graph_is_replayed_with_other_counts(
    native: Road, scaling: Scaling, gathered: bool
) -> None:
    case = Case(40, 3, 1, 192, 128)
    gate_up, _ = case.matrices(scaling)
    rows = quantized(random_tensor(case.tokens, case.width, dtype=native.dtype), scaling)
    tokens = kernels.tokens_per_tile(gate_up, case.tokens, case.experts)
    pairs = case.sort(tokens)
    tiles = pairs.groups.slots.new_zeros(case.tokens // tokens + case.experts)
    groups = replace(pairs.groups, tile_groups=tiles)
    row_index = pairs.row_index if gathered else None
    kernels.fp8_gemm(*rows, gate_up, groups, row_index, dtype=native.dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), poisoned_memory():
        output = kernels.fp8_gemm(*rows, gate_up, groups, row_index, dtype=native.dtype)

    for seed, total in enumerate((40, 17, 1, 0, 33)):
        choice = random_experts(total, case.experts, 1, seed=seed)
        fresh = sort_experts(choice, random_slots(case.experts, 4, seed), tokens)
        for target, source in (
            (groups.slots, fresh.groups.slots),
            (groups.offsets, fresh.groups.offsets),
            (groups.tile_offsets, fresh.groups.tile_offsets),
            (groups.tile_groups, fresh.groups.tile_groups),
            (pairs.row_index, fresh.row_index),
        ):
            target[: len(source)] = source
        graph.replay()
        assert output[total:].isnan().all(), "written where no pair is"
        if total:
            index = fresh.row_index if gathered else torch.arange(total, device="cuda")
            expected = expected_product(rows, gate_up, fresh, index)
            assert_close(output[:total], expected, MOST_ERROR[native.dtype])


def test_kernels_of_another_architecture_are_refused() -> None:
    gate_up, _ = Case(3, 2, 1, 128, 64).matrices("block")
    with on_road(Road(torch.bfloat16, AMPERE)), pytest.raises(MachineError) as raised:
        plan_fp8(gate_up, 3, 2)
    assert "sm_80ptx have no product of e4m3" in str(raised.value)
    assert "capability 9.0" in str(raised.value)
