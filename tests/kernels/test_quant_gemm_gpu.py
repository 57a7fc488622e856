"""quant_gemm of liblight_ops against the numbers that the codes stand for, in every format."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.kernels.quant_gemm import plan_quantized
from lightmoe.quant.fragments import PackedMatrix
from lightmoe.quant.packing import QuantizedExpertLayout
from lightmoe.quant.quantize import GROUP_SIZES, NUM_BITS
from tests.kernels.pairs import (
    COUNTS,
    Pairs,
    Road,
    assert_close,
    assert_tickets_are_zero,
    expected_product,
    group_counts,
    on_two_streams,
    only_tile,
    order_never_varies,
    poisoned_memory,
    random_experts,
    random_slots,
    random_tensor,
    sort_experts,
    split_tiles_of,
    tiles_of,
)
from tests.kernels.rows import random_rows

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Format:
    """How weights are quantised."""

    num_bits: int
    group_size: int
    symmetric: bool

    def __str__(self) -> str:
        """How pytest names it."""
        return f"int{self.num_bits}g{self.group_size}{'' if self.symmetric else '-zeros'}"


FORMATS = [
    Format(num_bits, group_size, symmetric)
    for num_bits in NUM_BITS
    for group_size in GROUP_SIZES
    for symmetric in (True, False)
]
ONE_OF_EACH_WIDTH = [Format(4, 128, True), Format(8, 32, False)]


@dataclass(frozen=True)
class Experts:
    """Both matrices of every expert, packed, and the numbers that they stand for [S, N, D]."""

    gate_up: PackedMatrix
    down: PackedMatrix
    dense_gate_up: Tensor
    dense_down: Tensor


@functools.cache
def quantized_experts(
    width: int, expert_width: int, how: Format, dtype: torch.dtype, num_slots: int
) -> Experts:
    """Random experts in the slots of a pool on the GPU."""
    layout = QuantizedExpertLayout(
        width, expert_width, how.num_bits, how.group_size, symmetric=how.symmetric, dtype=dtype
    )
    blobs = torch.zeros(num_slots, layout.num_elements, dtype=torch.uint8)
    for slot, blob in enumerate(blobs):
        gate_up = random_rows(2 * expert_width, width, seed=slot) * width**-0.5
        down = random_rows(width, expert_width, seed=slot + 50) * expert_width**-0.5
        if not how.symmetric:  # zero points that are not in the middle
            gate_up, down = gate_up + 0.5 * width**-0.5, down + 0.5 * expert_width**-0.5
        layout.write(blob, *gate_up.chunk(2), down)
    gate_up, down = layout.views(blobs.cuda())
    dense = [
        torch.stack([matrix.dense(slot) for slot in range(num_slots)]) for matrix in (gate_up, down)
    ]
    return Experts(gate_up, down, *dense)


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

    def experts_of(self, how: Format, dtype: torch.dtype) -> Experts:
        return quantized_experts(self.width, self.expert_width, how, dtype, self.experts + 1)


CASES = [
    Case(1, 8, 2, 128, 64),
    Case(7, 5, 2, 64, 192),
    Case(33, 3, 3, 192, 128),
    Case(301, 7, 2, 320, 64, used_experts=5),
    Case(301, 4, 1, 64, 64, used_experts=1),  # all pairs of one expert
    Case(1000, 3, 1, 128, 320),
    Case(3, 8, 2, 128, 64),
    Case(48, 7, 2, 64, 192),
    Case(700, 3, 2, 128, 64),
    Case(3000, 4, 1, 64, 64, used_experts=1),
]
# Blocks of 16 rows and 64 of depth are filled up: the kernels leave that away.
FILLED_UP = [Case(33, 3, 2, 136, 200), Case(7, 4, 2, 40, 24), Case(301, 2, 1, 24, 1048)]


def check_layer(case: Case, road: Road, how: Format, *, deterministic: bool) -> None:
    """Both products of a layer, gathered, in order and weighted."""
    experts = case.experts_of(how, road.dtype)
    num_pairs = case.tokens * case.per_token
    tokens = kernels.tokens_per_tile(
        experts.gate_up, num_pairs, case.experts, deterministic=deterministic
    )
    pairs = case.sort(tokens)
    rows = random_tensor(case.tokens, case.width, dtype=road.dtype)
    hidden = random_tensor(num_pairs, case.expert_width, dtype=road.dtype, seed=2)
    pair_weight = random_tensor(num_pairs, dtype=torch.float32, seed=3).abs()

    with poisoned_memory():
        gated = kernels.quant_gemm(
            rows, experts.gate_up, pairs.groups, pairs.row_index, deterministic=deterministic
        )
        weighted = kernels.quant_gemm(
            hidden, experts.down, pairs.groups, pair_weight=pair_weight, deterministic=deterministic
        )

    expected = expected_product(
        rows, experts.dense_gate_up, pairs.groups, pairs.row_index, swiglu=True
    )
    assert gated.dtype == road.dtype
    assert_close(gated, expected, road.most_error)
    expected = expected_product(hidden, experts.dense_down, pairs.groups, pair_weight=pair_weight)
    assert_close(weighted, expected, road.most_error)


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_products_are_those_of_the_dense_numbers(road: Road, how: Format) -> None:
    for case in CASES:
        for deterministic in (True, False):
            check_layer(case, road, how, deterministic=deterministic)


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_sizes_that_do_not_fill_blocks(road: Road, how: Format) -> None:
    for case in FILLED_UP:
        check_layer(case, road, how, deterministic=True)


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_every_tile_is_right(road: Road, how: Format) -> None:
    case = Case(190, 4, 2, 320, 192, used_experts=3)
    experts = case.experts_of(how, road.dtype)
    rows = random_tensor(case.tokens, case.width, dtype=road.dtype)
    hidden = random_tensor(case.tokens, case.expert_width, dtype=road.dtype, seed=2)
    operands = (rows, experts.gate_up), (hidden, experts.down)
    exact: list[list[Tensor]] = [[], []]
    for tile in tiles_of(road.dtype, how.num_bits):
        pairs = case.sort(tile.tokens)
        with only_tile(tile), poisoned_memory():
            made = [
                kernels.quant_gemm(*operand, pairs.groups, pairs.row_index, deterministic=False)
                for operand in operands
            ]
        expected = [
            expected_product(
                rows, experts.dense_gate_up, pairs.groups, pairs.row_index, swiglu=True
            ),
            expected_product(hidden, experts.dense_down, pairs.groups, pairs.row_index),
        ]
        for index in range(2):
            assert_close(made[index], expected[index], road.most_error)
            if order_never_varies(tile):
                exact[index].append(made[index])
    for same in exact:
        assert len(same) >= 3
        assert all(torch.equal(product, same[0]) for product in same)


@pytest.mark.parametrize("how", ONE_OF_EACH_WIDTH, ids=str)
def test_any_number_of_pairs_is_right(road: Road, how: Format) -> None:
    for width, expert_width in ((72, 40), (192, 264)):
        experts = quantized_experts(width, expert_width, how, road.dtype, 3)
        rows = random_tensor(sum(COUNTS), width, dtype=road.dtype)
        slots = torch.arange(len(COUNTS), dtype=torch.int32, device="cuda") % 3
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(4)).int().cuda()
        for tile in tiles_of(road.dtype, how.num_bits):
            groups = group_counts(COUNTS, slots, tile.tokens).groups
            expected = expected_product(rows, experts.dense_gate_up, groups, order, swiglu=True)
            with only_tile(tile), poisoned_memory():
                gathered, in_order, few_ctas = (
                    kernels.quant_gemm(some, experts.gate_up, groups, index, max_ctas=max_ctas)
                    for some, index, max_ctas in (
                        (rows, order, None),
                        (rows[order], None, None),
                        (rows, order, 3),
                    )
                )
            assert_close(gathered, expected, road.most_error)
            assert torch.equal(in_order, gathered), tile
            assert torch.equal(few_ctas, gathered), tile


@pytest.mark.parametrize("how", ONE_OF_EACH_WIDTH, ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_product_waits_for_the_kernels_in_front(
    native: Road, how: Format, deterministic: bool
) -> None:
    for num_tokens in (5, 700):
        case = Case(num_tokens, 3, 2, 128, 1024)
        experts = case.experts_of(how, native.dtype)
        mode = {"deterministic": deterministic}
        pairs = case.sort(
            kernels.tokens_per_tile(experts.gate_up, 2 * num_tokens, case.experts, **mode)
        )
        source = random_tensor(num_tokens, case.width, dtype=native.dtype)
        order = torch.arange(num_tokens, dtype=torch.int32, device="cuda").flip(0)
        made_of = (experts, pairs, source, order, mode)

        serial = quantized_layer(*made_of, synchronize=True)
        assert bool(serial.isfinite().all())
        for product in on_two_streams(functools.partial(quantized_layer, *made_of)):
            assert torch.equal(product, serial)


def quantized_layer(
    experts: Experts,
    pairs: Pairs,
    source: Tensor,
    order: Tensor,
    mode: dict[str, bool],
    *,
    synchronize: bool = False,
) -> Tensor:
    """A permutation and both products behind each other, or each on its own."""
    rows = kernels.permute(source, order)
    if synchronize:
        torch.cuda.synchronize()
    inner = kernels.quant_gemm(rows, experts.gate_up, pairs.groups, pairs.row_index, **mode)
    if synchronize:
        torch.cuda.synchronize()
    return kernels.quant_gemm(inner, experts.down, pairs.groups, groups_settled=True, **mode)


@pytest.mark.parametrize("how", ONE_OF_EACH_WIDTH, ids=str)
def test_warpgroups_that_share_a_depth_give_the_same_bits_again(native: Road, how: Format) -> None:
    tiles = [tile for tile in tiles_of(native.dtype, how.num_bits) if tile.depth_parts > 1]
    if not tiles:
        pytest.skip("only tiles of warpgroups share a depth within a CTA")
    case = Case(23, 3, 2, 320, 192)
    experts = case.experts_of(how, native.dtype)
    rows = random_tensor(case.tokens, case.width, dtype=native.dtype)
    for tile in tiles:
        pairs = case.sort(tile.tokens)
        with only_tile(tile):
            first, *others = (
                kernels.quant_gemm(
                    rows,
                    experts.gate_up,
                    pairs.groups,
                    pairs.row_index,
                    deterministic=False,
                    max_ctas=max_ctas,
                )
                for max_ctas in (None, None, 1, 4)
            )
        expected = expected_product(
            rows, experts.dense_gate_up, pairs.groups, pairs.row_index, swiglu=True
        )
        assert_close(first, expected, native.most_error)
        assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("splits", [2, 8])
@pytest.mark.parametrize("how", ONE_OF_EACH_WIDTH, ids=str)
def test_every_tile_adds_the_parts_of_a_split_depth(road: Road, how: Format, splits: int) -> None:
    case = Case(70, 4, 2, 128, 1024, used_experts=3)
    experts = case.experts_of(how, road.dtype)
    hidden = random_tensor(case.tokens, case.expert_width, dtype=road.dtype)
    for tile in split_tiles_of(road.dtype, how.num_bits):
        pairs = case.sort(tile.tokens)
        with only_tile(tile, splits), poisoned_memory():
            first, again, few_ctas = (
                kernels.quant_gemm(
                    hidden,
                    experts.down,
                    pairs.groups,
                    pairs.row_index,
                    deterministic=False,
                    max_ctas=max_ctas,
                )
                for max_ctas in (None, None, 3)
            )
        expected = expected_product(hidden, experts.dense_down, pairs.groups, pairs.row_index)
        assert_close(first, expected, road.most_error)
        assert torch.equal(first, again)
        assert torch.equal(first, few_ctas)
    assert_tickets_are_zero()


@pytest.mark.parametrize("max_ctas", [1, 5])
@pytest.mark.parametrize("how", ONE_OF_EACH_WIDTH, ids=str)
def test_few_ctas_compute_the_same(road: Road, how: Format, max_ctas: int) -> None:
    case = Case(301, 7, 2, 64, 320, used_experts=5)
    experts = case.experts_of(how, road.dtype)
    num_pairs = case.tokens * case.per_token
    pairs = case.sort(kernels.tokens_per_tile(experts.gate_up, num_pairs, case.experts))
    rows = random_tensor(case.tokens, case.width, dtype=road.dtype)

    with poisoned_memory():
        few, many = (
            kernels.quant_gemm(rows, experts.gate_up, pairs.groups, pairs.row_index, max_ctas=count)
            for count in (max_ctas, None)
        )

    assert bool(few.isfinite().all())
    assert torch.equal(few, many)


@pytest.mark.parametrize("how", ONE_OF_EACH_WIDTH, ids=str)
def test_a_row_has_the_same_bits_in_any_company(road: Road, how: Format) -> None:
    case = Case(600, 3, 1, 320, 192)
    experts = case.experts_of(how, road.dtype)
    rows = random_tensor(case.tokens, case.width, dtype=road.dtype)
    choice = random_experts(case.tokens, case.experts, 1)
    slots = random_slots(case.experts, case.experts)

    def products_of(tokens: Tensor, tokens_per_tile: int) -> Tensor:
        pairs = sort_experts(choice[tokens], slots, tokens_per_tile)
        row_index = tokens.int()[pairs.row_index]
        product = kernels.quant_gemm(rows, experts.gate_up, pairs.groups, row_index)
        return product[pairs.pair_index.flatten()]

    sizes = sorted({tile.tokens for tile in tiles_of(road.dtype, how.num_bits)})
    together = products_of(torch.arange(case.tokens, device="cuda"), sizes[-1])
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(5)).cuda()
    for tokens_per_tile in sizes:
        for count in (1, 2, 7, 8, 9, 17, 33, 64, 65, 129, 300, 600):
            some = order[-count:]
            assert torch.equal(products_of(some, tokens_per_tile), together[some]), (
                tokens_per_tile,
                count,
            )


@pytest.mark.parametrize("how", ONE_OF_EACH_WIDTH, ids=str)
def test_a_row_that_is_not_finite_spoils_nobody_else(road: Road, how: Format) -> None:
    case = Case(33, 3, 3, 192, 128)
    experts = case.experts_of(how, road.dtype)
    pairs = case.sort(
        kernels.tokens_per_tile(experts.gate_up, case.tokens * case.per_token, case.experts)
    )
    rows = random_tensor(case.tokens, case.width, dtype=road.dtype)
    spoilt = rows.clone()
    spoilt[5], spoilt[32] = torch.nan, torch.nan
    clean, product = (
        kernels.quant_gemm(some, experts.gate_up, pairs.groups, pairs.row_index)
        for some in (rows, spoilt)
    )

    own = torch.isin(pairs.row_index, torch.tensor([5, 32], device="cuda"))
    assert product[own].isnan().all()
    assert torch.equal(product[~own], clean[~own])


@pytest.mark.parametrize("how", ONE_OF_EACH_WIDTH, ids=str)
def test_split_products_give_the_same_bits_again(splitting: Road, how: Format) -> None:
    deep, wide = Case(3, 2, 1, 64, 4096), Case(5, 3, 1, 128, 2048)
    made = []
    for case in (deep, wide):
        experts = case.experts_of(how, splitting.dtype)
        plan = plan_quantized(experts.down, case.tokens, case.experts, deterministic=False)
        assert plan.depth_splits > 1, case
        pairs = case.sort(plan.tile.tokens)
        hidden = random_tensor(case.tokens, case.expert_width, dtype=splitting.dtype)
        expected = expected_product(hidden, experts.dense_down, pairs.groups, pairs.row_index)
        made.append((hidden, experts.down, pairs, expected))
    for _ in range(3):
        first: list[Tensor] = []
        for hidden, down, pairs, expected in (*made, *made):
            with poisoned_memory():
                product = kernels.quant_gemm(
                    hidden, down, pairs.groups, pairs.row_index, deterministic=False
                )
            assert_close(product, expected, splitting.most_error)
            first.append(product)
        assert torch.equal(first[0], first[2])
        assert torch.equal(first[1], first[3])
    assert_tickets_are_zero()


@pytest.mark.parametrize("how", ONE_OF_EACH_WIDTH, ids=str)
def test_a_graph_is_replayed_with_other_counts(native: Road, how: Format) -> None:
    case = Case(40, 3, 1, 192, 128)
    experts = case.experts_of(how, native.dtype)
    rows = random_tensor(case.tokens, case.width, dtype=native.dtype)
    tokens = kernels.tokens_per_tile(experts.gate_up, case.tokens, case.experts)
    pairs = case.sort(tokens)
    tiles = pairs.groups.slots.new_zeros(case.tokens // tokens + case.experts)
    groups = replace(pairs.groups, tile_groups=tiles)
    kernels.quant_gemm(rows, experts.gate_up, groups, pairs.row_index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), poisoned_memory():
        output = kernels.quant_gemm(rows, experts.gate_up, groups, pairs.row_index)

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
            expected = expected_product(
                rows, experts.dense_gate_up, fresh.groups, fresh.row_index, swiglu=True
            )
            assert_close(output[:total], expected, native.most_error)
