"""The choice of a tile: there always is one, it fits, and the others are refused with a number."""

from __future__ import annotations

import ctypes
import math
import random
import re
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightmoe.kernels.tiles import (
    MOST_STAGES,
    MULTIPROCESSORS,
    SHARED_BYTES,
    Product,
    Tile,
    candidates,
    choose_depth_splits,
    choose_stages,
    choose_tile,
    permutes_rows,
    rejections,
)
from tests.kernels.layouts.host import compile_library, kernels_module

ARCHITECTURES = [75, 80, 86, 89, 90]
# What one multiprocessor has, CUDA C++ programming guide, "Technical specifications".
SM_SHARED_BYTES = {75: 64 << 10, 80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10}
SM_THREADS = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048}
RESERVED_BYTES = {75: 0, 80: 1 << 10, 86: 1 << 10, 89: 1 << 10, 90: 1 << 10}  # of a CTA
STATIC_BYTES = 128  # what a kernel has beside the tile's memory: build.py's manifest says
MOST_SPLITS = 1 << 15  # a unit keeps the number of its part in 16 bits, sign included

eighths = st.integers(1, 2048).map(lambda count: 8 * count)
num_tokens = st.one_of(st.sampled_from([1, 48, 700]), st.integers(1, 65536))
COMPILED = [
    pytest.param(architecture, num_bits, tile, id=f"{architecture}-{num_bits}-{tile.name}")
    for architecture in ARCHITECTURES
    for num_bits in (16, 8, 4)
    for tile in candidates(architecture, num_bits)
]
FP8 = [
    pytest.param(90, 8, tile, id=f"90-fp8-{tile.name}") for tile in candidates(90, 8, row_bits=8)
]


@st.composite
def products(draw: st.DrawFn, *, deterministic: bool | None = None) -> Product:
    """Any product of a MoE layer or of a single matrix, on any card."""
    architecture = draw(st.sampled_from(ARCHITECTURES))
    experts_per_token = draw(st.integers(1, 16))
    return Product(
        architecture,
        num_pairs=draw(num_tokens) * experts_per_token,
        num_groups=draw(st.one_of(st.just(1), st.integers(1, 512))),
        num_features=draw(eighths),
        depth=draw(eighths),
        swiglu=draw(st.booleans()),
        half=architecture < 80 or draw(st.booleans()),
        deterministic=draw(st.booleans()) if deterministic is None else deterministic,
        num_bits=draw(st.sampled_from([16, 8, 4])),
    )


SEARCH = settings(deadline=None, derandomize=True, max_examples=400)
ONE_PAIR = Product(75, 1, 1, 8, 8, swiglu=False, half=True, deterministic=False)
SPLIT = Product(80, 4, 8, 512, 14336, swiglu=False, half=True, deterministic=False)
HOPPER = Product(90, 4, 8, 512, 14336, swiglu=False, half=False, deterministic=False)
PREFILL = Product(75, 65536, 8, 14336, 4096, swiglu=True, half=True, deterministic=False)


@SEARCH
@given(product=products())
@example(product=ONE_PAIR)
@example(product=SPLIT)
@example(product=HOPPER)
@example(product=PREFILL)
def test_there_is_always_a_tile_and_every_better_one_has_a_number_against_it(
    product: Product,
) -> None:
    tile = choose_tile(product)

    assert tile in candidates(product.architecture, product.num_bits)
    judged = rejections(product)
    assert [judged_tile for judged_tile, _ in judged] == list(
        candidates(product.architecture, product.num_bits)
    )
    assert dict(judged)[tile] is None
    for better, reason in judged[: judged.index((tile, None))]:
        assert reason is not None, better
        assert re.search(r"\d", reason), reason
    for other, reason in judged:
        if other.tokens != tile.tokens:
            assert reason is not None, "another number of tokens is a matter of preference"


@SEARCH
@given(product=products())
@example(product=ONE_PAIR)
@example(product=PREFILL)
def test_the_kernel_of_the_tile_is_compiled(product: Product) -> None:
    stem = "grouped_gemm" if product.num_bits == 16 else "quant_gemm"
    dtype = "f16" if product.half else "bf16"
    bits = "" if product.num_bits == 16 else f"_int{product.num_bits}"
    epilogue = "swiglu" if product.swiglu else "plain"

    name = f"{stem}_{dtype}{bits}_{choose_tile(product).name}_{epilogue}"

    assert name in compiled_names(product.architecture)


_names: dict[int, frozenset[str]] = {}


def compiled_names(architecture: int) -> frozenset[str]:
    if architecture not in _names:
        programs = kernels_module("instances").programs(architecture)
        _names[architecture] = frozenset(program.name for program in programs)
    return _names[architecture]


@SEARCH
@given(product=products(deterministic=True))
def test_a_deterministic_product_is_one_chain_of_fp32_sums(product: Product) -> None:
    tile = choose_tile(product)

    assert not tile.half_accumulate
    assert tile.depth_parts == 1
    assert choose_depth_splits(product, tile) == 1


@SEARCH
@given(product=products(deterministic=False))
@example(product=SPLIT)
def test_no_part_of_a_split_depth_is_empty(product: Product) -> None:
    tile = choose_tile(product)
    splits = choose_depth_splits(product, tile)

    stages = math.ceil(product.depth / tile.depth)
    part = math.ceil(stages / splits)  # as DepthSplit of matrix_kernel.cuh cuts it
    assert 1 <= splits <= min(stages, MOST_SPLITS)
    assert (splits - 1) * part < stages <= splits * part


def test_a_narrow_deep_product_is_split() -> None:
    assert choose_depth_splits(SPLIT, choose_tile(SPLIT)) > 1


@SEARCH
@given(product=products(deterministic=False))
@example(product=HOPPER)
def test_on_warpgroups_ctas_share_no_depth(product: Product) -> None:
    tile = choose_tile(replace(product, architecture=90))

    assert tile.limit >= tile.tokens
    assert choose_depth_splits(product, tile) == 1


# model: experts, experts of a token, width, expert width
LAYERS = [(8, 2, 4096, 14336), (64, 6, 2048, 1408), (128, 8, 2048, 768)]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("num_bits", [16, 8, 4])
@pytest.mark.parametrize("num_tokens", [1, 3, 48, 700, 3000, 4096])
def test_any_number_of_tokens_has_one_tile_for_both_products_on_hopper(
    num_tokens: int, num_bits: int, deterministic: bool
) -> None:
    for num_experts, per_token, width, expert_width in LAYERS:
        gate_up = Product(
            90,
            num_tokens * per_token,
            num_experts,
            expert_width,
            width,
            swiglu=True,
            half=False,
            deterministic=deterministic,
            num_bits=num_bits,
        )
        tile = choose_tile(gate_up)
        down = replace(
            gate_up,
            num_features=width,
            depth=expert_width,
            swiglu=False,
            tokens_per_tile=tile.tokens,
        )
        for product in (gate_up, down):
            assert [reason for _, reason in rejections(product)].count(None) == 1
        assert choose_tile(down).tokens == tile.tokens


def test_few_tiles_of_four_bits_share_a_stage_where_sums_may_differ() -> None:
    few = replace(HOPPER, num_bits=4, num_pairs=8)

    assert choose_tile(few).depth_parts > 1
    assert choose_tile(replace(few, deterministic=True)).depth_parts == 1
    assert choose_tile(replace(few, num_features=1 << 14)).depth_parts == 1


@pytest.mark.parametrize("num_features", [2048, 4096, 6144])
@pytest.mark.parametrize("num_tokens", [1, 9, 16, 33, 64])
def test_one_matrix_for_few_tokens_is_read_by_many_narrow_tiles(
    num_features: int, num_tokens: int
) -> None:
    product = Product(
        90, num_tokens, 1, num_features, 4096, swiglu=False, half=False, deterministic=True
    )

    tile = choose_tile(product)
    deeper = replace(tile, stages=choose_stages(product, tile))

    assert (tile.weight_rows, tile.tokens) == (64, 16)
    alone = product.num_outputs(tile) <= MULTIPROCESSORS[90]
    assert (deeper.stages > tile.stages) is alone
    assert deeper.stages <= MOST_STAGES
    assert deeper.shared_bytes(16) + STATIC_BYTES <= SHARED_BYTES[90]
    for other in (replace(product, num_pairs=512), replace(product, num_features=32000)):
        assert choose_tile(other).weight_rows > 64
        assert choose_stages(other, choose_tile(other)) == choose_tile(other).stages
    wide = choose_tile(replace(product, num_pairs=4096))  # where the caller's tiles are as wide
    assert choose_stages(product, wide) == wide.stages


def test_rows_are_permuted_where_the_tensor_cores_are_the_bound() -> None:
    prefill = replace(HOPPER, num_pairs=8 * 4096, num_features=14336)

    assert permutes_rows(prefill, choose_tile(prefill))
    for other in (
        replace(prefill, num_pairs=64),
        replace(prefill, num_features=512),
        replace(prefill, architecture=80),
    ):
        assert not permutes_rows(other, choose_tile(other))


@pytest.mark.parametrize(("num_bits", "row_bits"), [(16, 16), (8, 16), (4, 16), (8, 8)])
def test_tiles_of_warpgroups_are_as_deep_as_memory_allows(num_bits: int, row_bits: int) -> None:
    for tile in candidates(90, num_bits, row_bits):
        deeper = replace(tile, stages=tile.stages + 1)
        ctas_bytes = tile.ctas_per_sm * (deeper.shared_bytes(num_bits) + RESERVED_BYTES[90])

        assert tile.stages >= 4
        assert deeper.stages > MOST_STAGES or ctas_bytes > SM_SHARED_BYTES[90]
        assert tile.warps_weight % 4 == 0, "whole warpgroups"
        assert tile.weight_rows % (16 * tile.warps_weight) == 0, "64 rows of each"
        assert tile.tokens <= tile.limit
        assert tile.tokens % 16 == 0


@st.composite
def fp8_products(draw: st.DrawFn) -> Product:
    """Any product of a MoE layer in e4m3, on Hopper."""
    drawn = draw(products(deterministic=draw(st.booleans())))
    return replace(drawn, architecture=90, num_bits=8, row_bits=8, half=draw(st.booleans()))


@SEARCH
@given(product=fp8_products(), factor=st.floats(1, 64))
def test_a_product_in_e4m3_has_one_tile_of_those_that_are_compiled(
    product: Product, factor: float
) -> None:
    tile = choose_tile(product)

    judged = rejections(product)
    assert [judged_tile for judged_tile, _ in judged] == list(candidates(90, 8, 8))
    assert [reason for _, reason in judged].count(None) == 1
    epilogue = "swiglu" if product.swiglu else "plain"
    dtype = "f16" if product.half else "bf16"
    assert f"fp8_gemm_{dtype}_{tile.name}_{epilogue}" in compiled_names(90)
    assert choose_depth_splits(product, tile) == tile.depth_parts == 1
    assert not permutes_rows(product, tile)
    more = replace(product, num_pairs=math.ceil(product.num_pairs * factor))
    assert choose_tile(more).tokens >= tile.tokens
    same = replace(product, num_features=product.depth, depth=product.num_features, swiglu=False)
    assert choose_tile(replace(same, tokens_per_tile=tile.tokens)).tokens == tile.tokens


@pytest.mark.parametrize("architecture", [75, 80, 86, 89])
def test_only_hopper_has_tiles_in_e4m3(architecture: int) -> None:
    assert candidates(architecture, 8, row_bits=8) == ()
    with pytest.raises(ValueError, match=f"no tile .* on sm_{architecture}"):
        choose_tile(replace(HOPPER, architecture=architecture, num_bits=8, row_bits=8))


def test_every_tile_in_e4m3_is_chosen_for_something() -> None:
    chosen = {
        choose_tile(replace(HOPPER, num_pairs=pairs, num_features=features, num_bits=8, row_bits=8))
        for pairs in (1, 8, 64, 4096)
        for features in (64, 1024, 8192)
    }
    assert chosen == set(candidates(90, 8, row_bits=8))


def test_fp16_sums_are_taken_where_they_may() -> None:
    medium = replace(PREFILL, num_pairs=300)

    assert choose_tile(medium).half_accumulate
    assert not choose_tile(replace(medium, deterministic=True)).half_accumulate
    assert not choose_tile(replace(medium, half=False)).half_accumulate


@SEARCH
@given(product=products(), index=st.integers(0, 9))
def test_pairs_that_are_sorted_already_keep_their_tiles(product: Product, index: int) -> None:
    tiles = candidates(product.architecture, product.num_bits)
    tokens = sorted({tile.tokens for tile in tiles})
    wanted = tokens[index % len(tokens)]

    tile = choose_tile(replace(product, tokens_per_tile=wanted))

    assert tile.tokens == wanted
    assert tile in tiles
    assert not (tile.half_accumulate and product.deterministic)
    assert not (tile.depth_parts > 1 and product.deterministic)


@given(product=products(), tokens=st.integers(0, 300))
@settings(deadline=None, derandomize=True, max_examples=100)
@example(product=replace(ONE_PAIR, num_bits=8), tokens=128)
def test_pairs_sorted_into_tiles_that_nobody_compiled(product: Product, tokens: int) -> None:
    sorted_so = replace(product, tokens_per_tile=tokens)
    if tokens in {tile.tokens for tile in candidates(product.architecture, product.num_bits)}:
        assert choose_tile(sorted_so).tokens == tokens
        return
    with pytest.raises(ValueError, match=rf"{tokens} tokens on sm_{product.architecture}"):
        choose_tile(sorted_so)


@SEARCH
@given(product=products(), factor=st.floats(1, 64))
@example(product=replace(ONE_PAIR, num_pairs=32 * 64, num_bits=4), factor=33 / 32)
def test_more_pairs_never_get_fewer_tokens(product: Product, factor: float) -> None:
    more = replace(product, num_pairs=math.ceil(product.num_pairs * factor))

    assert choose_tile(more).tokens >= choose_tile(product).tokens


def test_more_pairs_never_get_fewer_tokens_one_by_one() -> None:
    for architecture in ARCHITECTURES:
        for num_bits in (16, 8, 4):
            for num_groups in (1, 8, 128):
                product = replace(SPLIT, architecture=architecture, num_groups=num_groups)
                tokens = [
                    choose_tile(replace(product, num_pairs=pairs, num_bits=num_bits)).tokens
                    for pairs in range(1, 200 * num_groups, max(1, num_groups // 8))
                ]
                assert tokens == sorted(tokens), (architecture, num_bits, num_groups)


@pytest.fixture(scope="module")
def tile_memory(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_library("tile_memory.cpp", tmp_path_factory.mktemp("tile_memory"))


@pytest.mark.parametrize(("architecture", "num_bits", "tile"), [*COMPILED, *FP8])
def test_the_formula_of_shared_memory_is_the_kernels(
    tile_memory: ctypes.CDLL, architecture: int, num_bits: int, tile: Tile
) -> None:
    fields = (ctypes.c_int * 9)(*tile.fields)

    of_kernel = (
        tile_memory.fp8_shared_bytes(fields)
        if tile.row_bits == 8
        else tile_memory.shared_bytes(fields, num_bits)
    )
    assert tile.shared_bytes(num_bits) == of_kernel


def test_a_kernel_has_barriers_for_as_many_stages(tile_memory: ctypes.CDLL) -> None:
    assert tile_memory.most_stages() == MOST_STAGES


@pytest.mark.parametrize(("architecture", "num_bits", "tile"), [*COMPILED, *FP8])
def test_a_multiprocessor_holds_the_ctas_that_the_tile_promises(
    architecture: int, num_bits: int, tile: Tile
) -> None:
    dynamic = tile.shared_bytes(num_bits)
    reserved = RESERVED_BYTES[architecture]

    assert dynamic + STATIC_BYTES <= SHARED_BYTES[architecture]
    assert SHARED_BYTES[architecture] + reserved == SM_SHARED_BYTES[architecture]
    of_all = tile.ctas_per_sm * (dynamic + STATIC_BYTES + reserved)
    assert of_all <= SM_SHARED_BYTES[architecture]
    assert tile.ctas_per_sm * tile.threads <= SM_THREADS[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_bits", [16, 8, 4])
def test_no_tile_is_compiled_that_is_never_chosen(architecture: int, num_bits: int) -> None:
    generator = random.Random(0)
    never = set(candidates(architecture, num_bits))
    for _ in range(20_000):
        if not never:
            break
        product = Product(
            architecture,
            num_pairs=int(2 ** generator.uniform(0, 15)),
            num_groups=generator.choice([1, 2, 4, 8, 16, 60, 64, 128, 256]),
            num_features=8 * generator.randint(1, 2000),
            depth=8 * generator.randint(1, 2000),
            swiglu=generator.random() < 0.5,
            half=True,
            deterministic=generator.random() < 0.5,
            num_bits=num_bits,
        )
        never.discard(choose_tile(product))

    assert not never
