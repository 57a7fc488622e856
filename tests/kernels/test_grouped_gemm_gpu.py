"""grouped_gemm and matmul of liblight_ops: right, row-invariant, the same in graphs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.kernels import PairGroups
from lightmoe.kernels.grouped_gemm import plan_weights
from tests.kernels.pairs import (
    COUNTS,
    Pairs,
    Road,
    assert_close,
    assert_tickets_are_zero,
    expected_product,
    gathered_rows,
    group_counts,
    has_split_tiles,
    on_two_streams,
    only_tile,
    order_never_varies,
    poisoned_memory,
    random_experts,
    random_slots,
    random_tensor,
    random_weights,
    sort_experts,
    split_tiles_of,
    tiles_of,
)

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Case:
    """Sizes of a product: tokens, experts, experts of a token, depth, features."""

    tokens: int
    experts: int
    per_token: int
    depth: int
    features: int
    used_experts: int | None = None  # the others have no pairs

    def sort(self, tokens_per_tile: int) -> Pairs:
        experts = random_experts(self.tokens, self.used_experts or self.experts, self.per_token)
        slots = random_slots(self.experts, self.experts + 3)
        return sort_experts(experts, slots, tokens_per_tile)

    def operands(self, dtype: torch.dtype, *, swiglu: bool) -> tuple[Tensor, Tensor]:
        rows = random_tensor(self.tokens, self.depth, dtype=dtype)
        num_rows = self.features * (2 if swiglu else 1)
        return rows, random_weights(self.experts + 3, num_rows, self.depth, dtype=dtype)


CASES = [
    Case(1, 8, 2, 1408, 24),
    Case(1, 1, 1, 24, 8),
    Case(7, 5, 2, 40, 136),
    Case(33, 64, 8, 136, 200),
    Case(33, 3, 3, 8, 1408),
    Case(301, 16, 4, 200, 136),
    Case(301, 8, 1, 64, 40, used_experts=1),  # all pairs of one expert
    Case(1000, 4, 2, 1408, 200),
    Case(1000, 300, 6, 24, 72, used_experts=70),  # most experts have no pairs
    Case(48, 8, 2, 4096, 128),
    Case(700, 2, 1, 512, 256),
    Case(400, 8, 1, 4096, 136),  # Turing: fp16 sums where they may
    Case(3, 8, 2, 72, 40),  # neither a panel of 64 of depth nor a tile is full
    Case(48, 64, 6, 72, 40),
    Case(700, 8, 2, 328, 264),
    Case(3000, 8, 2, 72, 40),
    Case(3000, 8, 1, 200, 296, used_experts=1),
]


# Pairs of groups: few tiles and many, most of one group's, none at all.
CLAIMED_COUNTS = [[3], [0, 1, 0, 700, 0, 3, 90, 0], [32] * 64, [0] * 7 + [2048], [0] * 8]
CLAIMING_CTAS = [1, 5, 100, 1000]


def product_of(
    case: Case, road: Road, *, swiglu: bool, deterministic: bool
) -> tuple[Tensor, Tensor, Pairs]:
    """Rows, weights and sorted pairs as a layer makes them."""
    rows, weights = case.operands(road.dtype, swiglu=swiglu)
    tokens = kernels.tokens_per_tile(
        weights,
        case.tokens * case.per_token,
        case.experts,
        swiglu=swiglu,
        deterministic=deterministic,
    )
    return rows, weights, case.sort(tokens)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_right(road: Road, case: Case, swiglu: bool, deterministic: bool) -> None:
    rows, weights, pairs = product_of(case, road, swiglu=swiglu, deterministic=deterministic)
    pair_weight = random_tensor(pairs.groups.num_pairs, dtype=torch.float32, seed=3).abs()
    gathered = rows[pairs.row_index]
    mode = {"swiglu": swiglu, "deterministic": deterministic}

    with poisoned_memory():
        plain = kernels.grouped_gemm(rows, weights, pairs.groups, pairs.row_index, **mode)
        in_order = kernels.grouped_gemm(gathered, weights, pairs.groups, **mode)
        weighted = kernels.grouped_gemm(
            rows, weights, pairs.groups, pairs.row_index, pair_weight=pair_weight, **mode
        )

    expected = expected_product(rows, weights, pairs.groups, pairs.row_index, swiglu=swiglu)
    assert plain.dtype == road.dtype
    assert_close(plain, expected, road.most_error)
    assert torch.equal(in_order, plain)
    assert_close(weighted, expected * pair_weight[:, None], road.most_error)


@pytest.mark.parametrize("swiglu", [False, True])
def test_every_tile_is_right(road: Road, swiglu: bool) -> None:
    case = Case(190, 6, 3, 328, 296, used_experts=5)
    rows, weights = case.operands(road.dtype, swiglu=swiglu)
    exact = []
    for tile in tiles_of(road.dtype, 16):
        pairs = case.sort(tile.tokens)
        with only_tile(tile), poisoned_memory():
            product = kernels.grouped_gemm(
                rows, weights, pairs.groups, pairs.row_index, swiglu=swiglu, deterministic=False
            )
        expected = expected_product(rows, weights, pairs.groups, pairs.row_index, swiglu=swiglu)
        assert_close(product, expected, road.most_error)
        if order_never_varies(tile):
            exact.append(product)
    assert len(exact) >= 3
    assert all(torch.equal(product, exact[0]) for product in exact)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("depth", "num_features"), [(72, 40), (200, 264)])
def test_any_number_of_pairs_is_right(
    road: Road, depth: int, num_features: int, swiglu: bool
) -> None:
    num_pairs, num_rows = sum(COUNTS), num_features * (2 if swiglu else 1)
    rows = random_tensor(num_pairs, depth, dtype=road.dtype)
    weights = random_weights(len(COUNTS) + 3, num_rows, depth, dtype=road.dtype)
    slots = random_slots(len(COUNTS), len(weights))
    order = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(4)).int().cuda()
    for tile in tiles_of(road.dtype, 16):
        groups = group_counts(COUNTS, slots, tile.tokens).groups
        expected = expected_product(rows, weights, groups, order, swiglu=swiglu)
        with only_tile(tile), poisoned_memory():
            gathered = kernels.grouped_gemm(rows, weights, groups, order, swiglu=swiglu)
            in_order = kernels.grouped_gemm(rows[order], weights, groups, swiglu=swiglu)
            few_ctas = kernels.grouped_gemm(rows, weights, groups, order, swiglu=swiglu, max_ctas=3)
        assert_close(gathered, expected, road.most_error)
        assert torch.equal(in_order, gathered), tile
        assert torch.equal(few_ctas, gathered), tile


@pytest.mark.parametrize("swiglu", [False, True])
def test_rows_that_are_permuted_first_give_the_same_bits(native: Road, swiglu: bool) -> None:
    case = Case(1500, 4, 2, 136, 2048, used_experts=3)
    rows, weights, pairs = product_of(case, native, swiglu=swiglu, deterministic=True)
    plan = plan_weights(
        weights, pairs.groups.num_pairs, case.experts, swiglu=swiglu, deterministic=True
    )
    assert plan.permutes == (plan.tile.limit > 0)
    pair_weight = random_tensor(pairs.groups.num_pairs, dtype=torch.float32, seed=3)

    def multiply() -> Tensor:
        return kernels.grouped_gemm(
            rows, weights, pairs.groups, pairs.row_index, swiglu=swiglu, pair_weight=pair_weight
        )

    permuted = multiply()
    with gathered_rows():
        gathered = multiply()

    expected = expected_product(
        rows, weights, pairs.groups, pairs.row_index, swiglu=swiglu, pair_weight=pair_weight
    )
    assert_close(permuted, expected, native.most_error)
    assert torch.equal(permuted, gathered)


@pytest.mark.parametrize("num_tokens", [5, 700])
def test_a_product_waits_for_the_kernels_in_front(native: Road, num_tokens: int) -> None:
    gate_up = random_weights(8, 2 * 264, 4096, dtype=native.dtype)
    down = random_weights(8, 4096, 264, dtype=native.dtype, seed=2)
    tokens = kernels.tokens_per_tile(gate_up, 2 * num_tokens, 8, swiglu=True)
    pairs = sort_experts(random_experts(num_tokens, 8, 2), random_slots(8, 8), tokens)
    source = random_tensor(num_tokens, 4096, dtype=native.dtype)
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(6)).int().cuda()

    def layer(synchronize: bool = False) -> Tensor:
        rows = kernels.permute(source, order)
        if synchronize:
            torch.cuda.synchronize()
        inner = kernels.grouped_gemm(rows, gate_up, pairs.groups, pairs.row_index, swiglu=True)
        if synchronize:
            torch.cuda.synchronize()
        return kernels.grouped_gemm(inner, down, pairs.groups, groups_settled=True)

    serial = layer(synchronize=True)
    assert bool(serial.isfinite().all())
    for product in on_two_streams(layer):
        assert torch.equal(product, serial)


@pytest.mark.parametrize("splits", [2, 3, 8])
def test_every_tile_adds_the_parts_of_a_split_depth(road: Road, splits: int) -> None:
    case = Case(70, 6, 2, 1000, 168, used_experts=5)
    rows, weights = case.operands(road.dtype, swiglu=False)
    for tile in split_tiles_of(road.dtype, 16):
        pairs = case.sort(tile.tokens)
        expected = expected_product(rows, weights, pairs.groups, pairs.row_index)
        with only_tile(tile, splits), poisoned_memory():
            first, again, few_ctas = (
                kernels.grouped_gemm(
                    rows,
                    weights,
                    pairs.groups,
                    pairs.row_index,
                    deterministic=False,
                    max_ctas=max_ctas,
                )
                for max_ctas in (None, None, 3)
            )
        assert_close(first, expected, road.most_error)
        assert torch.equal(first, again)
        assert torch.equal(first, few_ctas)
    assert_tickets_are_zero()


@pytest.mark.parametrize("max_ctas", [1, 5])
@pytest.mark.parametrize("swiglu", [False, True])
def test_few_ctas_compute_the_same(road: Road, swiglu: bool, max_ctas: int) -> None:
    # A queue of 16 look-ups at a time turns over, also where a tile is one stage deep.
    # There are fewer groups than CTAs, and more of them, of which many have no pairs.
    for depth, experts, used_experts in ((24, 16, 16), (200, 16, 16), (72, 400, 250)):
        case = Case(301, experts, 4, depth, 264, used_experts)
        rows, weights, pairs = product_of(case, road, swiglu=swiglu, deterministic=True)
        with poisoned_memory():
            few = kernels.grouped_gemm(
                rows, weights, pairs.groups, pairs.row_index, swiglu=swiglu, max_ctas=max_ctas
            )
        many = kernels.grouped_gemm(rows, weights, pairs.groups, pairs.row_index, swiglu=swiglu)
        assert torch.equal(few, many)
        expected = expected_product(rows, weights, pairs.groups, pairs.row_index, swiglu=swiglu)
        assert_close(few, expected, road.most_error)


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("depth", [8, 328])
@pytest.mark.parametrize("counts", CLAIMED_COUNTS, ids=str)
def test_claimed_tiles_have_the_bits_of_a_ctas_own(
    native: Road, counts: list[int], depth: int, gathers: bool
) -> None:
    bound, total, slots = 2048, sum(counts), random_slots(len(counts), len(counts))
    rows = random_tensor(bound, depth, dtype=native.dtype)
    weights = random_weights(len(counts), 520, depth, dtype=native.dtype)
    for tile in tiles_of(native.dtype, 16):
        static = StaticPairs(bound, slots, tile.tokens)
        static.write(group_counts(counts, slots, tile.tokens))
        row_index = static.row_index if gathers else None

        def multiply(
            output: Tensor,
            max_ctas: int | None,
            groups: PairGroups = static.groups,
            row_index: Tensor | None = row_index,
        ) -> None:
            kernels.grouped_gemm(rows, weights, groups, row_index, max_ctas=max_ctas, output=output)

        own, *claimed = rows.new_full((1 + 3 * len(CLAIMING_CTAS), bound, 520), torch.nan)
        with only_tile(tile), gathered_rows():
            multiply(own, None)
            for output, max_ctas in zip(claimed, 3 * CLAIMING_CTAS, strict=True):
                multiply(output, max_ctas)  # nothing between them: each leaves the ticket zero
        assert own[:total].isfinite().all()
        for output, max_ctas in zip(claimed, 3 * CLAIMING_CTAS, strict=True):
            assert torch.equal(output[:total], own[:total]), (tile.name, max_ctas)
            assert output[total:].isnan().all(), "written where no pair is"
    assert_claims_left_zero()


@pytest.mark.parametrize("max_ctas", CLAIMING_CTAS)
def test_a_graph_claims_tiles_of_other_counts(native: Road, max_ctas: int) -> None:
    bound, num_groups = 2048, 8
    slots = random_slots(num_groups, num_groups)
    rows = random_tensor(bound, 200, dtype=native.dtype)
    weights = random_weights(num_groups, 2 * 264, 200, dtype=native.dtype)
    tokens = kernels.tokens_per_tile(weights, bound, num_groups, swiglu=True)
    static = StaticPairs(bound, slots, tokens)

    def multiply(max_ctas: int | None) -> Tensor:
        return kernels.grouped_gemm(
            rows, weights, static.groups, swiglu=True, max_ctas=max_ctas, groups_settled=True
        )

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        multiply(max_ctas)  # the stream has its ticket from now on
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = [multiply(max_ctas) for _ in range(3)]
    for counts in ([256] * 8, [0] * 8, [2048, *[0] * 7], [1, 0, 700, 0, 0, 3, 90, 5]):
        static.write(group_counts(counts, slots, tokens))
        own = multiply(None)
        for _ in range(4):
            for output in outputs:
                output.fill_(torch.nan)
            graph.replay()
            for output in outputs:
                assert torch.equal(output[: sum(counts)], own[: sum(counts)]), counts
                assert output[sum(counts) :].isnan().all()


def test_two_streams_claim_tiles_at_once(native: Road) -> None:
    case = Case(2000, 8, 2, 328, 520, used_experts=7)
    rows, weights, pairs = product_of(case, native, swiglu=True, deterministic=True)

    def multiply(max_ctas: int | None = 60) -> Tensor:
        return kernels.grouped_gemm(
            rows, weights, pairs.groups, pairs.row_index, swiglu=True, max_ctas=max_ctas
        )

    own = multiply(None)
    for product in on_two_streams(multiply, rounds=8):
        assert torch.equal(product, own)


def assert_claims_left_zero() -> None:
    """Products of the current stream have left its ticket zero, where tiles are claimed."""
    if not has_split_tiles():
        assert_tickets_are_zero()


@pytest.mark.parametrize("swiglu", [False, True])
def test_a_row_has_the_same_bits_in_any_company(road: Road, swiglu: bool) -> None:
    num_tokens, num_experts = 600, 3
    rows = random_tensor(num_tokens, 200, dtype=road.dtype)
    num_rows = 136 * (2 if swiglu else 1)
    weights = random_weights(num_experts, num_rows, 200, dtype=road.dtype)
    experts = random_experts(num_tokens, num_experts, 1)
    slots = random_slots(num_experts, num_experts)

    def products_of(tokens: Tensor, tokens_per_tile: int) -> Tensor:
        pairs = sort_experts(experts[tokens], slots, tokens_per_tile)
        row_index = tokens.int()[pairs.row_index]
        product = kernels.grouped_gemm(rows, weights, pairs.groups, row_index, swiglu=swiglu)
        return product[pairs.pair_index.flatten()]

    everyone = torch.arange(num_tokens, device="cuda")
    sizes = sorted({tile.tokens for tile in tiles_of(road.dtype, 16)})
    together = products_of(everyone, sizes[-1])
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(5)).cuda()
    for tokens_per_tile in sizes:
        for count in (1, 2, 7, 8, 9, 17, 33, 64, 65, 129, 300, 600):
            some = order[-count:]
            assert torch.equal(products_of(some, tokens_per_tile), together[some]), (
                tokens_per_tile,
                count,
            )


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_row_that_is_not_finite_spoils_nobody_else(road: Road, deterministic: bool) -> None:
    case = Case(33, 4, 2, 1600, 72)
    rows, weights, pairs = product_of(case, road, swiglu=False, deterministic=deterministic)
    spoilt = rows.clone()
    spoilt[5], spoilt[17, 3], spoilt[32] = torch.nan, torch.inf, torch.nan
    clean, product = (
        kernels.grouped_gemm(
            some, weights, pairs.groups, pairs.row_index, deterministic=deterministic
        )
        for some in (rows, spoilt)
    )

    own = torch.isin(pairs.row_index, torch.tensor([5, 17, 32], device="cuda"))
    assert int(own.sum()) == 6
    assert not product[own].isfinite().any()
    assert torch.equal(product[~own], clean[~own])


def test_split_products_of_other_sizes_follow_each_other(splitting: Road) -> None:
    cases = [Case(4, 8, 2, 14336, 512), Case(1, 4, 1, 6144, 136), Case(7, 3, 2, 4096, 328)]
    made = [product_of(case, splitting, swiglu=True, deterministic=False) for case in cases]
    for case, (_, weights, _) in zip(cases, made, strict=True):
        num_pairs = case.tokens * case.per_token
        plan = plan_weights(weights, num_pairs, case.experts, swiglu=True, deterministic=False)
        assert plan.depth_splits > 1, case
    first: list[Tensor] = []
    for _ in range(3):
        for index, (rows, weights, pairs) in enumerate(made):
            with poisoned_memory():
                product = kernels.grouped_gemm(
                    rows, weights, pairs.groups, pairs.row_index, swiglu=True, deterministic=False
                )
            if len(first) < len(made):
                first.append(product)
                expected = expected_product(
                    rows, weights, pairs.groups, pairs.row_index, swiglu=True
                )
                assert_close(product, expected, splitting.most_error)
            assert torch.equal(product, first[index])
    assert_tickets_are_zero()


MATMULS = [
    (1, 24, 40),
    (7, 1408, 136),
    (33, 200, 1408),
    (301, 40, 24),
    (1000, 136, 200),
    (3000, 72, 40),
]


@pytest.mark.parametrize("sizes", MATMULS, ids=str)
def test_one_matrix_for_all_rows(road: Road, sizes: tuple[int, int, int]) -> None:
    num_rows, depth, num_features = sizes
    rows = random_tensor(num_rows, depth, dtype=road.dtype)
    weight = random_weights(num_features, depth, dtype=road.dtype)
    gate_up = random_weights(2 * num_features, depth, dtype=road.dtype)

    with poisoned_memory():
        rounded = kernels.matmul(rows, weight)
        sums = kernels.matmul(rows, weight, output_float32=True)
        gated = kernels.matmul(rows, gate_up, swiglu=True)

    expected = rows.double() @ weight.double().t()
    assert sums.dtype == torch.float32
    assert_close(sums, expected, 1e-5)
    assert torch.equal(sums.to(road.dtype), rounded)
    gate, up = (rows.double() @ gate_up.double().t()).chunk(2, dim=1)
    assert_close(gated, torch.nn.functional.silu(gate) * up, road.most_error)
    free = kernels.matmul(rows, gate_up, swiglu=True, deterministic=False)
    assert_close(free, torch.nn.functional.silu(gate) * up, road.most_error)


def test_a_row_of_one_matrix_has_the_same_bits_in_any_company(road: Road) -> None:
    rows = random_tensor(600, 328, dtype=road.dtype)
    weight = random_weights(272, 328, dtype=road.dtype)
    together = kernels.matmul(rows, weight)
    gated = kernels.matmul(rows, weight, swiglu=True)
    for count in (1, 2, 5, 8, 9, 16, 17, 31, 33, 48, 64, 65, 100, 128, 129, 255, 300, 599):
        for first in (0, 600 - count):
            some = rows[first : first + count]
            assert torch.equal(kernels.matmul(some, weight), together[first : first + count])
            assert torch.equal(
                kernels.matmul(some, weight, swiglu=True), gated[first : first + count]
            )


def test_memory_beyond_four_gib_is_reached(native: Road) -> None:
    num_slots, num_rows, num_features, depth = 1030, 530_000, 512, 4096
    last_slot = torch.tensor([num_slots - 1], dtype=torch.int32).cuda()
    pairs = group_counts([33], last_slot, tiles_of(native.dtype, 16)[0].tokens)
    rows = random_tensor(33, depth, dtype=native.dtype)
    weight = random_weights(num_features, depth, dtype=native.dtype)
    expected = rows.double() @ weight.double().t()

    pool = torch.empty(num_slots, num_features, depth, dtype=native.dtype, device="cuda")
    pool[-1] = weight
    far_weight = kernels.grouped_gemm(rows, pool, pairs.groups)
    del pool
    many_rows = torch.empty(num_rows, depth, dtype=native.dtype, device="cuda")
    many_rows[-33:] = rows
    far_rows = kernels.grouped_gemm(
        many_rows,
        weight[None],
        replace(pairs.groups, slots=torch.zeros_like(pairs.groups.slots)),
        pairs.row_index + (num_rows - 33),
    )

    assert_close(far_weight, expected, native.most_error)
    assert torch.equal(far_rows, far_weight)


def test_no_pairs_make_no_product(road: Road) -> None:
    groups = group_counts([0, 0], random_slots(2, 2), 8).groups
    rows = random_tensor(0, 64, dtype=road.dtype)
    weights = random_weights(2, 24, 64, dtype=road.dtype)

    assert kernels.grouped_gemm(rows, weights, groups).shape == (0, 24)
    assert kernels.matmul(rows, weights[0]).shape == (0, 24)


class StaticPairs:
    """Pairs in memory that stays, as a graph needs it: at most `num_pairs` of them."""

    def __init__(self, num_pairs: int, slots: Tensor, tokens_per_tile: int) -> None:
        num_groups = len(slots)
        self.groups = PairGroups(
            slots=slots.clone(),
            offsets=slots.new_zeros(num_groups + 1),
            tile_offsets=slots.new_zeros(num_groups + 1),
            tile_groups=slots.new_zeros(num_pairs // tokens_per_tile + num_groups),
            tokens_per_tile=tokens_per_tile,
            num_pairs=num_pairs,
        )
        self.row_index = slots.new_zeros(num_pairs)

    def write(self, pairs: Pairs) -> None:
        assert self.groups.tile_groups is not None
        assert self.groups.tile_offsets is not None
        self.groups.slots.copy_(pairs.groups.slots)
        self.groups.offsets.copy_(pairs.groups.offsets)
        self.groups.tile_offsets.copy_(pairs.groups.tile_offsets)
        self.groups.tile_groups[: len(pairs.groups.tile_groups)] = pairs.groups.tile_groups
        self.row_index[: pairs.groups.num_pairs] = pairs.row_index


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_graph_is_replayed_with_other_counts(native: Road, deterministic: bool) -> None:
    case = Case(64, 8, 2, 4096, 136)
    rows, weights = case.operands(native.dtype, swiglu=True)
    mode = {"swiglu": True, "deterministic": deterministic}
    bound = case.tokens * case.per_token
    tokens = kernels.tokens_per_tile(weights, bound, case.experts, **mode)
    plan = plan_weights(weights, bound, case.experts, **mode)
    assert (plan.depth_splits == 1) == (deterministic or plan.tile.limit > 0)
    static = StaticPairs(bound, random_slots(case.experts, len(weights)), tokens)
    kernels.grouped_gemm(rows, weights, static.groups, static.row_index, **mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), poisoned_memory():
        output = kernels.grouped_gemm(rows, weights, static.groups, static.row_index, **mode)

    for seed, counts in enumerate(
        ([16] * 8, [bound, 0, 0, 0, 0, 0, 0, 0], [0, 1, 9, 0, 33, 20, 0, 0], [0] * 8, [1] * 8)
    ):
        fresh = group_counts(counts, random_slots(case.experts, len(weights), seed), tokens)
        # As many pairs as there may be: some tokens come twice.
        fresh = Pairs(fresh.groups, fresh.row_index % case.tokens, fresh.pair_index)
        static.write(fresh)
        rows.copy_(random_tensor(case.tokens, case.depth, dtype=native.dtype, seed=seed + 10))
        graph.replay()
        total = sum(counts)
        assert output[total:].isnan().all(), "written where no pair is"
        if total:
            expected = expected_product(rows, weights, fresh.groups, fresh.row_index, swiglu=True)
            assert_close(output[:total], expected, native.most_error)


def test_a_graph_that_was_captured_second_may_be_replayed_first(splitting: Road) -> None:
    case = Case(4, 8, 2, 14336, 512)
    rows, weights, pairs = product_of(case, splitting, swiglu=True, deterministic=False)

    def multiply() -> Tensor:
        return kernels.grouped_gemm(
            rows, weights, pairs.groups, pairs.row_index, swiglu=True, deterministic=False
        )

    expected = multiply()
    stream = torch.cuda.Stream()  # a new one: nothing has been launched there
    used, first, second = (torch.cuda.CUDAGraph() for _ in range(3))
    with torch.cuda.graph(used, stream=stream):
        # A whole segment of the allocator's for tensors below 1 MiB.
        numbers = [torch.full((1 << 17,), 1, dtype=torch.int32, device="cuda") for _ in range(4)]
    used.replay()
    del numbers  # their memory is the next graphs': what those do not write is 1
    outputs = []
    for graph in (first, second):
        with torch.cuda.graph(graph, pool=used.pool(), stream=stream), poisoned_memory():
            outputs.append(multiply())
    second.replay()
    torch.cuda.synchronize()
    assert torch.equal(outputs[1], expected)
