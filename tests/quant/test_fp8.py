"""Weights as e4m3: error bounds, blocks at the borders, the blob, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightmoe.errors import CheckpointError, UsageError
from lightmoe.quant.fp8 import (
    CODE_DTYPE,
    LARGEST,
    Fp8ExpertLayout,
    Fp8Matrix,
    Scaling,
    quantize_blocks,
    quantize_channels,
)

ROUNDERS = {"block": quantize_blocks, "channel": quantize_channels}
SCALINGS: list[Scaling] = ["block", "channel"]
LAYOUTS = [
    Fp8ExpertLayout(width, expert_width, scaling)
    for width, expert_width in ((256, 128), (144, 208), (13, 7))
    for scaling in SCALINGS
]


def random_weight(num_rows: int, depth: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, depth, generator=generator)
    return weight * torch.randn(num_rows, 1, generator=generator).exp()


def random_expert(layout: Fp8ExpertLayout, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width, expert_width = layout.hidden_size, layout.expert_size
    gate, up = torch.randn(2, expert_width, width, generator=generator)
    return gate, up, torch.randn(width, expert_width, generator=generator)


def scale_of_each(matrix: Fp8Matrix) -> Tensor:
    """The scale of every weight of slot 0, [N, D], one at a time."""
    num_rows, depth = matrix.codes.shape[1:]
    each = torch.empty(num_rows, depth)
    for row in range(num_rows):
        part, place = divmod(row, matrix.num_features)
        block = part * -(-matrix.num_features // 128) + place // 128
        for column in range(depth):
            by_block = matrix.scaling == "block"
            each[row, column] = matrix.scales[(0, block, column // 128) if by_block else (0, row)]
    return each


@pytest.mark.parametrize("scaling", SCALINGS)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    num_rows=st.integers(1, 300),
    depth=st.integers(1, 300),
    seed=st.integers(0, 99),
    exponent=st.integers(-20, 20),
)
def test_a_value_is_off_by_no_more_than_half_a_step_of_its_code(
    scaling: Scaling, num_rows: int, depth: int, seed: int, exponent: int
) -> None:
    weight = random_weight(num_rows, depth, seed) * 2.0**exponent

    matrix = ROUNDERS[scaling](weight)

    assert matrix.codes.dtype == CODE_DTYPE
    assert matrix.codes.shape == (1, num_rows, depth)
    assert (matrix.num_features, matrix.depth, matrix.scaling) == (num_rows, depth, scaling)
    blocks = (-(-num_rows // 128), -(-depth // 128))
    assert matrix.scales.shape == (1, *(blocks if scaling == "block" else (num_rows,)))
    scales = matrix.scales_by_row(0)
    each = scales.repeat_interleave(128, dim=1)[:, :depth] if scaling == "block" else scales
    # 3 bits of fraction; below 2^-6 codes are multiples of 2^-9
    bound = torch.maximum(weight.abs() / 16, each * 2.0**-10) * (1 + 1e-5)
    assert ((matrix.dense(0) - weight).abs() <= bound).all()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_largest_of_what_shares_a_scale_is_448(scaling: Scaling) -> None:
    weight = random_weight(200, 300)

    codes = ROUNDERS[scaling](weight).codes[0].float().abs()

    if scaling == "channel":
        assert (codes.amax(dim=1) == LARGEST).all()
        return
    for rows in codes.split(128):
        for block in rows.split(128, dim=1):
            assert block.max() == LARGEST


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_each_weight_has_the_scale_of_its_block_or_channel(scaling: Scaling, swiglu: bool) -> None:
    matrix = ROUNDERS[scaling](random_weight(280, 150), swiglu=swiglu)
    assert len(matrix.scales.unique()) == matrix.scales.numel()

    assert torch.equal(matrix.dense(0), matrix.codes[0].float() * scale_of_each(matrix))


@pytest.mark.parametrize("quantize", ROUNDERS.values(), ids=ROUNDERS)
def test_gate_and_up_share_no_scale(quantize: Callable[..., Fp8Matrix]) -> None:
    gate, up = random_weight(200, 150), 100 * random_weight(200, 150, seed=1)

    both = quantize(torch.cat([gate, up]), swiglu=True)

    apart = [quantize(part) for part in (gate, up)]
    assert torch.equal(both.dense(0), torch.cat([part.dense(0) for part in apart]))
    assert torch.equal(both.scales, torch.cat([part.scales for part in apart], dim=1))
    assert both.num_features == 200


@pytest.mark.parametrize("quantize", ROUNDERS.values(), ids=ROUNDERS)
def test_blocks_do_not_depend_on_the_rows_beside_them(quantize: Callable[..., Fp8Matrix]) -> None:
    weight = random_weight(1100, 64)

    whole, part = quantize(weight), quantize(weight[640:896])

    assert torch.equal(whole.dense(0)[640:896], part.dense(0))


@pytest.mark.parametrize("quantize", ROUNDERS.values(), ids=ROUNDERS)
def test_zeros_stay_zero_and_make_no_nan(quantize: Callable[..., Fp8Matrix]) -> None:
    weight = random_weight(256, 256)
    weight[:128, :128] = 0.0
    weight[200] = 0.0

    value = quantize(weight).dense(0)

    assert (value[weight == 0] == 0).all()
    assert value.isfinite().all()


@pytest.mark.parametrize("quantize", ROUNDERS.values(), ids=ROUNDERS)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(exponent=st.integers(-45, 37), sign=st.sampled_from([-1.0, 1.0]))
def test_no_size_of_weight_makes_infinities(
    quantize: Callable[..., Fp8Matrix], exponent: int, sign: float
) -> None:
    weight = random_weight(3, 70).clamp(-3, 3) * sign * 10.0**exponent
    weight[1, 20] = 3.4e38

    value = quantize(weight).dense(0)

    assert value.isfinite().all()
    assert (value * weight.sign() >= 0).all()


@pytest.mark.parametrize("quantize", ROUNDERS.values(), ids=ROUNDERS)
def test_numbers_of_e4m3_come_back_exactly(quantize: Callable[..., Fp8Matrix]) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(CODE_DTYPE).float()
    numbers = codes[codes.isfinite()]

    value = quantize(numbers[None] / 32).dense(0)

    assert torch.equal(value[0], numbers / 32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quantize", ROUNDERS.values(), ids=ROUNDERS)
def test_weights_that_are_no_numbers_are_refused(
    quantize: Callable[..., Fp8Matrix], value: float
) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 63] = value

    with pytest.raises(CheckpointError, match=r"\[2, 64\].*NaN or infinity"):
        quantize(weight)


def test_a_weight_without_as_many_up_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="weight has 3 rows; with swiglu"):
        quantize_blocks(torch.zeros(3, 64), swiglu=True)


def test_a_published_checkpoint_is_a_matrix() -> None:
    """As DeepSeek-V3 stores it: value = weight * weight_scale_inv of its block."""
    gate, up = (random_weight(200, 300, seed).to(CODE_DTYPE) for seed in range(2))
    gate_scale, up_scale = (random_weight(2, 3, seed).abs() for seed in range(2))

    matrix = Fp8Matrix(
        torch.cat([gate, up])[None], torch.cat([gate_scale, up_scale])[None], swiglu=True
    )

    for part, codes, scales in ((0, gate, gate_scale), (1, up, up_scale)):
        whole = scales.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
        values = codes.float() * whole[:200, :300]
        assert torch.equal(matrix.dense(0)[part * 200 : part * 200 + 200], values)


def codes_of(*shape: int) -> Tensor:
    return torch.zeros(shape).to(CODE_DTYPE)


@pytest.mark.parametrize(
    ("codes", "scales", "swiglu", "message"),
    [
        (torch.zeros(1, 2, 64), torch.zeros(1, 2), False, "codes are torch.float32"),
        (codes_of(1, 2, 64), torch.zeros(1, 2).half(), False, "scales torch.float16; give"),
        (codes_of(2, 64), torch.zeros(2), False, r"codes \[2, 64\] with scales \[2\]; give"),
        (codes_of(1, 3, 64), torch.zeros(1, 3), True, "codes has 3 rows; with swiglu"),
        (codes_of(1, 3, 64), torch.zeros(1, 4), False, r"scales is \[1, 4\]; .* need \[1, 3\]"),
        (codes_of(2, 3, 64), torch.zeros(1, 3), False, r"need \[2, 3\]"),
        (codes_of(1, 129, 129), torch.zeros(1, 2, 1), False, r"need \[1, 2, 2\]"),
        (codes_of(1, 258, 64), torch.zeros(1, 3, 1), True, r"with swiglu need \[1, 4, 1\]"),
    ],
)
def test_codes_and_scales_that_do_not_belong_together_are_refused(
    codes: Tensor, scales: Tensor, swiglu: bool, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Fp8Matrix(codes, scales, swiglu)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_experts_come_back_through_the_views(layout: Fp8ExpertLayout) -> None:
    blobs = torch.full((3, layout.num_elements), 255, dtype=torch.uint8)
    experts = [random_expert(layout, seed) for seed in range(3)]

    for blob, expert in zip(blobs, experts, strict=True):
        layout.write(blob, *expert)

    quantize = ROUNDERS[layout.scaling]
    gate_up, down = layout.views(blobs)
    assert (gate_up.swiglu, down.swiglu) == (True, False)
    for slot, (gate, up, down_weight) in enumerate(experts):
        wanted = quantize(torch.cat([gate, up]), swiglu=True)
        assert torch.equal(gate_up.dense(slot), wanted.dense(0))
        assert torch.equal(down.dense(slot), quantize(down_weight).dense(0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_part_of_a_blob_is_aligned_and_no_part_meets_another(
    layout: Fp8ExpertLayout,
) -> None:
    blobs = torch.zeros(2, layout.num_elements, dtype=torch.uint8)
    base = blobs.data_ptr()
    assert layout.num_elements % 128 == 0
    parts = [part for matrix in layout.views(blobs) for part in (matrix.codes, matrix.scales)]

    spans = [(part[0].data_ptr() - base, part[0].nbytes) for part in parts]
    for begin, _ in spans:
        assert begin % 128 == 0
    for part in parts:
        assert part[0].is_contiguous()
        assert part[1].data_ptr() - part[0].data_ptr() == layout.num_elements
    for (begin, num_bytes), (following, _) in pairwise([*spans, (layout.num_elements, 0)]):
        assert 0 <= following - begin - num_bytes < 128


def test_the_bytes_of_a_deepseek_expert_are_its_weights_and_a_scale_a_block() -> None:
    layout = Fp8ExpertLayout(7168, 2048, "block")

    num_weights = 3 * 7168 * 2048
    assert layout.num_elements == num_weights + num_weights // 128**2 * 4


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Fp8ExpertLayout(64, 32, "block"), "gate_up is 2 x 32 x 64 e4m3 by block; .* by channel"),
        (Fp8ExpertLayout(64, 48, "channel"), "gate_up is 2 x 48 x 64 e4m3 by channel; .* 2 x 32 x"),
    ],
)
def test_a_matrix_of_another_layout_is_refused(other: Fp8ExpertLayout, message: str) -> None:
    layout = Fp8ExpertLayout(64, 32, "channel")
    blob = torch.zeros(layout.num_elements, dtype=torch.uint8)
    matrices = other.views(torch.zeros(1, other.num_elements, dtype=torch.uint8))

    with pytest.raises(UsageError, match=message):
        layout.write_quantized(blob, *matrices)


def test_matrices_of_several_slots_are_no_expert() -> None:
    layout = Fp8ExpertLayout(64, 32, "block")
    several = layout.views(torch.zeros(2, layout.num_elements, dtype=torch.uint8))

    with pytest.raises(UsageError, match="gate_up is .* of 2 slots; "):
        layout.write_quantized(torch.zeros(layout.num_elements, dtype=torch.uint8), *several)
