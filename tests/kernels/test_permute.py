"""Rows to int8 and back, and to e4m3: half a step, ties to even, zeros and what is not finite."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.errors import MachineError
from lightmoe.kernels import reference
from lightmoe.kernels.permute import permute_fp8
from tests.kernels.rows import DTYPES, random_rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(row_index=st.lists(st.integers(0, 9), max_size=20), exponent=st.integers(-20, 10))
def test_values_come_back_within_half_a_step(
    dtype: torch.dtype, row_index: list[int], exponent: int
) -> None:
    rows = (random_rows(10, 24) * 2.0**exponent).to(dtype)

    packed, scales = reference.permute_int8(rows, torch.tensor(row_index, dtype=torch.int64))

    assert packed.dtype == torch.int8
    assert packed.shape == (len(row_index), 24)
    picked = rows[row_index].double()
    magnitude = picked.abs().amax(dim=1) if len(row_index) else picked.new_empty(0)
    torch.testing.assert_close(scales.double(), magnitude / 127, rtol=1e-6, atol=0.0)
    error = (packed.double() * scales.double()[:, None] - picked).abs()
    assert (error <= 0.5001 * magnitude[:, None] / 127).all()
    assert (packed.abs().amax(dim=1) == 127).all() if len(row_index) else True


def test_ties_go_to_even() -> None:
    rows = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])

    packed, scales = reference.permute_int8(rows, torch.tensor([0]))

    assert packed.tolist() == [[127, 0, 2, 2, 0, -2]]
    assert scales.tolist() == [1.0]


def test_zeros_have_scale_zero_and_rows_that_are_not_finite_come_back_as_nan() -> None:
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, 0.0], [1.0, nan], [-inf, 1.0], [2.0, -2.0]])

    packed, scales = reference.permute_int8(rows, torch.arange(4))
    back = reference.dequantize_rows(packed, scales, torch.float32)

    assert packed.tolist() == [[0, 0], [0, 0], [0, 0], [127, -127]]
    assert back[0].tolist() == [0.0, 0.0]
    assert back[1:3].isnan().all()
    assert back[3].tolist() == pytest.approx([2.0, -2.0])


def test_dequantising_may_reorder() -> None:
    packed, scales = reference.permute_int8(random_rows(5, 8), torch.arange(5))
    order = torch.tensor([4, 0, 0])

    back = reference.dequantize_rows(packed, scales, torch.bfloat16, order)

    whole = reference.dequantize_rows(packed, scales, torch.bfloat16)
    assert torch.equal(back, whole[order])


def as_numbers(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What e4m3 rows stand for, in float64."""
    each = scales[:, None] if scales.dim() == 1 else scales.repeat_interleave(128, dim=1)
    return codes.double() * each[:, : codes.shape[1]].double()


@pytest.mark.parametrize("group_size", [128, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    row_index=st.none() | st.lists(st.integers(0, 9), max_size=20),
    width=st.sampled_from([8, 128, 136, 304]),
    exponent=st.integers(-12, 10),
)
def test_e4m3_values_are_off_by_no_more_than_half_a_step(
    group_size: int | None,
    dtype: torch.dtype,
    row_index: list[int] | None,
    width: int,
    exponent: int,
) -> None:
    rows = (random_rows(10, width) * 2.0**exponent).to(dtype)
    index = None if row_index is None else torch.tensor(row_index, dtype=torch.int64)

    codes, scales = reference.permute_fp8(rows, index, group_size=group_size)

    picked = (rows if index is None else rows[index]).double()
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.shape == picked.shape
    sizes = [128] * (width // 128) + [width % 128] * (width % 128 > 0) if group_size else [width]
    magnitude = torch.stack([g.abs().amax(dim=1) for g in picked.split(sizes, 1)], dim=1)
    wanted = magnitude / 448 if group_size else magnitude[:, 0] / 448
    torch.testing.assert_close(scales.double(), wanted, rtol=1e-6, atol=0.0)
    each = magnitude.repeat_interleave(torch.tensor(sizes), dim=1) / 448
    bound = torch.maximum(picked.abs() / 16, each * 2.0**-10) * (1 + 1e-5)
    assert ((as_numbers(codes, scales) - picked).abs() <= bound).all()
    for group in codes.float().split(sizes, 1):
        assert (group.abs().amax(dim=1) == 448).all()


def test_e4m3_ties_go_to_even() -> None:
    rows = torch.tensor([[448.0, 432.0, 17.0, 19.0, -19.0, 2.0**-10, 3 * 2.0**-10]])

    codes, scales = reference.permute_fp8(rows)

    assert codes.tolist() == [[448.0, 448.0, 16.0, 20.0, -20.0, 0.0, 2.0**-8]]
    assert scales.tolist() == [[1.0]]


@pytest.mark.parametrize("group_size", [128, None])
def test_e4m3_zeros_have_scale_zero_and_what_is_not_finite_is_nan(group_size: int | None) -> None:
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, -1e-31], [1.0, nan], [-inf, 1.0], [-nan, 0.0], [2.0, -1.0]])

    codes, scales = reference.permute_fp8(rows, group_size=group_size)

    assert codes.view(torch.uint8).tolist() == [[0, 0x80], *[[0x7F, 0x7F]] * 3, [0x7E, 0xF6]]
    assert scales.flatten()[0] == 0.0
    assert scales.flatten()[1:4].isnan().all()
    assert as_numbers(codes, scales)[4].tolist() == pytest.approx([2.0, -1.0])


def test_e4m3_groups_have_scales_of_their_own() -> None:
    rows = random_rows(3, 200)
    rows[1, 128:] *= 1000
    rows[2, 5] = float("nan")

    codes, scales = reference.permute_fp8(rows)

    for group, part in enumerate(rows.split(128, dim=1)):
        wanted, scale = reference.permute_fp8(part)
        found = codes.view(torch.uint8).split(128, dim=1)[group]
        assert torch.equal(found, wanted.view(torch.uint8))
        torch.testing.assert_close(
            scales[:, group], scale[:, 0], rtol=0.0, atol=0.0, equal_nan=True
        )


class OldKernels:
    """A library whose kernels know no e4m3."""

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture

    def architecture_of(self, device: torch.device) -> str:
        return self._architecture


@pytest.mark.parametrize("architecture", ["75", "86", "75ptx"])
def test_cards_without_e4m3_are_told_so(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("lightmoe.kernels.permute")  # not the operator of that name
    monkeypatch.setattr(module, "require_cuda", lambda stem, **tensors: None)
    monkeypatch.setattr(module, "library", lambda: OldKernels(architecture))

    with pytest.raises(MachineError, match=f"sm_{architecture} cannot convert .* 8.9 or later"):
        permute_fp8(random_rows(2, 128, dtype=torch.float16))
