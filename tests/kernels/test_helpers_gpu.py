"""Products that two launches on two streams share: the bits of one launch, whoever comes first, in
graphs, and again and again with the same tickets.
"""

from __future__ import annotations

import importlib
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.kernels import PairGroups
from lightmoe.kernels.grouped_gemm import GroupedProduct, plan_weights
from lightmoe.kernels.helpers import Helper, Helpers
from lightmoe.kernels.library import library
from lightmoe.kernels.products import make_room_on_stream
from tests.kernels.pairs import (
    DELAY_CYCLES,
    Road,
    gathered_rows,
    group_counts,
    has_split_tiles,
    only_tile,
    random_slots,
    random_tensor,
    random_weights,
    tiles_of,
)
from tests.kernels.test_grouped_gemm_gpu import StaticPairs

pytestmark = pytest.mark.gpu

wrapper = importlib.import_module("lightmoe.kernels.grouped_gemm")  # the package's is a function
BOUND = 2048
COUNTS = [[3], [0, 1, 0, 700, 0, 3, 90, 0], [32] * 64, [0] * 7 + [BOUND], [0] * 8]
CTAS = [(1, 1), (1, 100), (57, 75), (100, 3), (1000, 1000)]  # of both launches


class Both:
    """Two streams, the current one and another, that products share."""

    def __init__(self, most: int = 1) -> None:
        self.own = torch.cuda.current_stream()
        self.other = torch.cuda.Stream()
        self.helpers = Helpers(self.own.device, most)

    def help(self, helper: Helper, *, late: bool = False) -> None:
        """Launch it on the other stream, `late` behind the product, and join."""
        with torch.cuda.stream(self.other):
            if late:
                torch.cuda._sleep(DELAY_CYCLES)
            helper.launch(self.other)
        self.own.wait_stream(self.other)

    def assert_tickets_are_zero(self) -> None:
        torch.cuda.synchronize()
        assert not self.helpers._tickets.any()


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("depth", [8, 328])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_shared_products_have_the_bits_of_one_launch(
    native: Road, counts: list[int], depth: int, gathers: bool
) -> None:
    total, slots = sum(counts), random_slots(len(counts), len(counts))
    rows = random_tensor(BOUND, depth, dtype=native.dtype)
    product = GroupedProduct(random_weights(len(counts), 520, depth, dtype=native.dtype))
    for tile in tiles_of(native.dtype, 16):
        static = StaticPairs(BOUND, slots, tile.tokens)
        static.write(group_counts(counts, slots, tile.tokens))
        index = static.row_index if gathers else None
        product._plans.clear()  # each tile is a plan of its own
        own, *shared = rows.new_full((1 + 2 * len(CTAS), BOUND, 520), torch.nan)
        both = Both(len(shared))
        with only_tile(tile), gathered_rows():
            product(rows, static.groups, index, output=own)
            for place, output in enumerate(shared):
                max_ctas, helper_ctas = CTAS[place // 2]
                helper = both.helpers.of(helper_ctas, both.own)
                product(rows, static.groups, index, max_ctas=max_ctas, output=output, helper=helper)
                both.help(helper, late=place % 2 == 1)
        both.assert_tickets_are_zero()
        for place, output in enumerate(shared):
            assert torch.equal(output[:total], own[:total]), (tile.name, CTAS[place // 2])
            assert output[total:].isnan().all(), "written where no pair is"


def operands(native: Road, counts: list[int]) -> tuple[Tensor, GroupedProduct, PairGroups]:
    """Rows, the product with SwiGLU, and groups of so many pairs."""
    rows = random_tensor(sum(counts), 200, dtype=native.dtype)
    weights = random_weights(len(counts), 2 * 264, 200, dtype=native.dtype)
    slots = random_slots(len(counts), len(counts))
    tokens = kernels.tokens_per_tile(weights, sum(counts), len(counts), swiglu=True)
    return rows, GroupedProduct(weights, swiglu=True), group_counts(counts, slots, tokens).groups


@pytest.mark.parametrize("max_ctas", [1, 5])
def test_who_helps_may_be_there_first(native: Road, max_ctas: int) -> None:
    if has_split_tiles():
        pytest.skip("only tiles of warpgroups are claimed")
    rows, product, groups = operands(native, [700, 0, 3, 90])
    own = product(rows, groups)
    both, shared = Both(), torch.full_like(own, torch.nan)
    helper = both.helpers.of(60, both.own)
    held = mock.Mock(wraps=library())  # the product itself is held back
    with mock.patch.object(wrapper, "library", return_value=held):
        held.launch = mock.Mock()
        product._plans.clear()
        product(rows, groups, max_ctas=max_ctas, output=shared, helper=helper)
    both.help(helper)
    torch.cuda.synchronize()
    written = shared == own
    assert not written.all(), "the first tiles are the product's own"
    assert written.any()
    assert (written | shared.isnan()).all()
    (launch,) = held.launch.call_args_list
    library().launch(*launch.args, **launch.kwargs)
    both.assert_tickets_are_zero()
    assert torch.equal(shared, own)


def test_rows_that_are_permuted_first_are_there_for_both(native: Road) -> None:
    counts = [700, 400, 0, 900]
    rows = random_tensor(sum(counts), 136, dtype=native.dtype)
    weights = random_weights(4, 4096, 136, dtype=native.dtype)
    plan = plan_weights(weights, sum(counts), 4, swiglu=False, deterministic=True)
    assert plan.permutes == (plan.tile.limit > 0)
    product = GroupedProduct(weights)
    pairs = group_counts(counts, random_slots(4, 4), plan.tile.tokens)
    own = product(rows, pairs.groups, pairs.row_index)
    both = Both(4)
    shared = []
    for _ in range(4):
        helper = both.helpers.of(70, both.own)
        shared.append(product(rows, pairs.groups, pairs.row_index, max_ctas=60, helper=helper))
        rows.new_full((sum(counts), 136), torch.nan)  # takes memory that is given back too early
        both.help(helper, late=True)
    both.assert_tickets_are_zero()
    assert all(torch.equal(output, own) for output in shared)


def test_products_help_each_other_round_after_round(native: Road) -> None:
    rows, product, groups = operands(native, [1500, 0, 300, 900, 40])
    own = product(rows, groups)
    streams = torch.cuda.current_stream(), torch.cuda.Stream()
    made = []
    for _ in range(8):
        helpers = Helpers(own.device, 2)  # the same tickets every time
        streams[1].wait_stream(streams[0])
        for stream, max_ctas, other in ((streams[0], 5, 8), (streams[1], 8, 5)):
            helper = helpers.of(other, stream)
            with torch.cuda.stream(stream):
                made.append((helper, product(rows, groups, max_ctas=max_ctas, helper=helper)))
        for stream, (helper, _) in zip(streams[::-1], made[-2:], strict=True):
            with torch.cuda.stream(stream):
                helper.launch(stream)
        streams[0].wait_stream(streams[1])
    torch.cuda.synchronize()
    assert not helpers._tickets.any()
    for _, output in made:
        assert torch.equal(output, own)


@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize("ctas", CTAS, ids=str)
def test_a_graph_shares_products_of_other_counts(
    native: Road, ctas: tuple[int, int], has_room: bool
) -> None:
    num_groups = 8
    slots = random_slots(num_groups, num_groups)
    rows = random_tensor(BOUND, 200, dtype=native.dtype)
    weights = random_weights(num_groups, 2 * 264, 200, dtype=native.dtype)
    product = GroupedProduct(weights, swiglu=True)
    tokens = kernels.tokens_per_tile(weights, BOUND, num_groups, swiglu=True)
    static = StaticPairs(BOUND, slots, tokens)
    stream = torch.cuda.Stream()
    if has_room:
        with torch.cuda.stream(stream):
            make_room_on_stream(rows.device)
    product(rows, static.groups, max_ctas=ctas[0])  # loads what a capture must not
    torch.cuda.synchronize()
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=stream):
        both = Both(3)
        both.other.wait_stream(both.own)
        for _ in range(3):
            helper = both.helpers.of(ctas[1], both.own)
            outputs.append(product(rows, static.groups, max_ctas=ctas[0], helper=helper))
            both.help(helper)
    for counts in ([256] * 8, [0] * 8, [BOUND, *[0] * 7], [1, 0, 700, 0, 0, 3, 90, 5]):
        static.write(group_counts(counts, slots, tokens))
        own = product(rows, static.groups)
        for _ in range(3):
            for output in outputs:
                output.fill_(torch.nan)
            graph.replay()
            for output in outputs:
                assert torch.equal(output[: sum(counts)], own[: sum(counts)]), counts
                assert output[sum(counts) :].isnan().all()
    both.assert_tickets_are_zero()
