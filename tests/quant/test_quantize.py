"""Rounding weights to codes: error bounds, groups of any kind, and what the codes stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightmoe.errors import CheckpointError, UsageError
from lightmoe.quant.quantize import (
    GROUP_SIZES,
    NUM_BITS,
    SCALE_DTYPES,
    dequantize,
    middle,
    quantize_groups,
)

FORMATS = st.fixed_dictionaries(
    {
        "num_bits": st.sampled_from(NUM_BITS),
        "group_size": st.sampled_from(GROUP_SIZES),
        "symmetric": st.booleans(),
        "dtype": st.sampled_from(SCALE_DTYPES),
    }
)


def random_weight(num_rows: int, depth: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, depth, generator=generator)
    return weight * torch.randn(num_rows, 1, generator=generator).exp()


def round_trip(
    weight: Tensor, num_bits: int, group_size: int, *, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The numbers that stand for the weight, and the scale of each."""
    codes, scales, zeros = quantize_groups(
        weight, num_bits, group_size, symmetric=symmetric, dtype=dtype
    )
    num_groups = -(-weight.shape[1] // group_size)
    assert codes.dtype == torch.uint8
    assert codes.shape == weight.shape
    assert scales.dtype == dtype
    assert scales.shape == (len(weight), num_groups)
    assert (zeros is None) == symmetric
    if zeros is not None:
        assert zeros.dtype == torch.uint8
        assert zeros.shape == scales.shape
    assert int(codes.max()) < 1 << num_bits
    each = scales.repeat_interleave(group_size, dim=1)[:, : weight.shape[1]]
    return dequantize(codes, scales, zeros, num_bits, group_size), each.float()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(form=FORMATS, num_rows=st.integers(1, 9), depth=st.integers(1, 300), seed=st.integers(0, 99))
def test_a_value_is_off_by_no_more_than_a_step(
    form: dict[str, Any], num_rows: int, depth: int, seed: int
) -> None:
    weight = random_weight(num_rows, depth, seed)

    value, scale = round_trip(weight, **form)

    rounding = torch.finfo(value.dtype).eps
    bound = scale.abs() * (1 + rounding) + weight.abs() * rounding
    assert ((value.float() - weight).abs() <= bound).all()


@pytest.mark.parametrize(("num_bits", "relative_error"), [(4, 0.11), (8, 0.0075)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
def test_normal_weights_keep_most_of_their_bits(
    num_bits: int, relative_error: float, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = random_weight(64, 1024)

    value, _ = round_trip(weight, num_bits, 128, symmetric=symmetric, dtype=dtype)

    assert (value.float() - weight).norm() <= relative_error * weight.norm()


@pytest.mark.parametrize("num_bits", NUM_BITS)
def test_the_symmetric_scale_is_never_worse_than_the_usual_one(num_bits: int) -> None:
    weight = random_weight(200, 32)
    half = middle(num_bits)
    usual = (weight.abs().amax(dim=1, keepdim=True) / (half - 1)).half().float()
    usual_error = ((weight / usual).round().clamp(-half, half - 1) * usual - weight).square()

    codes, scales, _ = quantize_groups(weight, num_bits, 32, symmetric=True, dtype=torch.float16)
    error = ((codes.float() - half) * scales.float() - weight).square()

    assert (error.sum(dim=1) <= usual_error.sum(dim=1)).all()
    assert (error.sum(dim=1) < usual_error.sum(dim=1)).any()
    assert bool((scales < 0).any())
    assert bool((scales > 0).any())


@pytest.mark.parametrize("extreme", [-8.0, 7.0, 8.0, -7.0])
def test_multiples_of_a_step_come_back_exactly(extreme: float) -> None:
    numbers = torch.arange(32).remainder(8) * (extreme / abs(extreme))
    numbers[5] = extreme
    weight = numbers[None] / 64

    value, _ = round_trip(weight, 4, 32, symmetric=True, dtype=torch.bfloat16)

    assert torch.equal(value.float(), weight)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(form=FORMATS, offset=st.sampled_from([-50.0, -1.0, 0.0, 1.0, 50.0]))
def test_a_code_inside_its_range_is_the_nearest(form: dict[str, Any], offset: float) -> None:
    weight = torch.rand(40, 128, generator=torch.Generator().manual_seed(0)) * 4 - 2 + offset

    codes, scales, zeros = quantize_groups(weight, **form)

    middles = torch.full_like(scales, middle(form["num_bits"])) if zeros is None else zeros
    step, zero = (
        part.float().repeat_interleave(form["group_size"], dim=1) for part in (scales, middles)
    )
    error = ((codes.float() - zero) * step - weight).abs()
    inside = (codes > 0) & (codes < (1 << form["num_bits"]) - 1)
    assert bool(inside.any())
    assert (error[inside] <= 0.5001 * step.abs()[inside]).all()
    assert (error <= 1.6 * step.abs()).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_has_no_step_and_the_code_of_zero(symmetric: bool) -> None:
    codes, scales, zeros = quantize_groups(
        torch.zeros(2, 64), 4, 32, symmetric=symmetric, dtype=torch.float16
    )

    assert (scales == 0).all()
    assert (codes == (8 if symmetric else 0)).all()
    assert symmetric or (zeros == 0).all()


@settings(deadline=None, derandomize=True, max_examples=30)
@given(form=FORMATS)
def test_zero_stays_zero(form: dict[str, Any]) -> None:
    weight = random_weight(4, 200)
    weight[1] = 0.0
    weight[2, 32:64] = 0.0
    weight[3, ::3] = 0.0

    value, _ = round_trip(weight, **form)

    assert (value[weight == 0] == 0).all()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(form=FORMATS, exponent=st.integers(-44, 37), sign=st.sampled_from([-1.0, 1.0]))
def test_no_size_of_weight_makes_infinities(
    form: dict[str, Any], exponent: int, sign: float
) -> None:
    weight = random_weight(3, 70).clamp(-3, 3) * sign * 10.0**exponent
    weight[1, 20] = 3.4e38

    value, _ = round_trip(weight, **form)

    assert value.isfinite().all()
    assert (value.float() * weight.sign() >= 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_short_last_group_has_a_scale_of_its_own(symmetric: bool) -> None:
    weight = random_weight(5, 40)
    weight[:, 32:] *= 100

    whole = quantize_groups(weight, 4, 32, symmetric=symmetric, dtype=torch.float16)
    first = quantize_groups(weight[:, :32], 4, 32, symmetric=symmetric, dtype=torch.float16)
    last = quantize_groups(weight[:, 32:], 4, 32, symmetric=symmetric, dtype=torch.float16)

    for together, left, right in zip(whole, first, last, strict=True):
        if together is not None:
            assert left is not None
            assert right is not None
            assert torch.equal(together, torch.cat([left, right], dim=1))


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    weight = random_weight(1100, 64)

    codes, scales, zeros = quantize_groups(weight, 4, 32, symmetric=False, dtype=torch.float16)
    alone = quantize_groups(weight[777:778], 4, 32, symmetric=False, dtype=torch.float16)

    assert zeros is not None
    for part, one in zip((codes, scales, zeros), alone, strict=True):
        assert one is not None
        assert torch.equal(part[777:778], one)


@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("num_bits", NUM_BITS)
def test_values_are_what_16_bit_arithmetic_gives(num_bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << num_bits, (64, 96), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << num_bits, (64, 3), generator=generator, dtype=torch.uint8)
    scales = torch.randn(64, 3, generator=generator).to(dtype)

    values = dequantize(codes, scales, zeros, num_bits, 32)

    difference = codes.to(dtype) - zeros.to(dtype).repeat_interleave(32, dim=1)
    assert torch.equal(values, difference * scales.repeat_interleave(32, dim=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 63] = value

    with pytest.raises(CheckpointError, match=r"\[2, 64\].*NaN or infinity"):
        quantize_groups(weight, 4, 32, symmetric=True, dtype=torch.float16)


@pytest.mark.parametrize(
    ("num_bits", "group_size", "dtype", "message"),
    [
        (3, 32, torch.float16, "num_bits is 3; give one of 4, 8"),
        (4, 48, torch.float16, "group_size is 48; give one of 32, 64, 128"),
        (4, 32, torch.float32, "dtype is torch.float32; give one of torch.float16, torch.bfloat16"),
    ],
)
def test_unknown_formats_are_refused(
    num_bits: int, group_size: int, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        quantize_groups(torch.zeros(2, 64), num_bits, group_size, symmetric=True, dtype=dtype)
