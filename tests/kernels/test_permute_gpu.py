"""permute, int8 and e4m3 rows against the reference, bit by bit; needs `make kernels`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightmoe.errors import MachineError
from lightmoe.kernels import reference
from lightmoe.kernels.permute import dequantize_rows, permute, permute_fp8, permute_int8
from tests.gpus import half_dtypes
from tests.kernels.pairs import TURING, Road, on_road

E4M3_FROM = (8, 9)

pytestmark = pytest.mark.gpu


def rows_of(num_rows: int, width: int, dtype_name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = torch.randn(num_rows, width, device="cuda", generator=generator)
    return rows.to(getattr(torch, dtype_name))


def test_nothing_to_permute() -> None:
    none = torch.empty(0, dtype=torch.int32, device="cuda")
    rows = rows_of(4, 16, "float16")

    assert permute(rows, none).shape == (0, 16)
    packed, scales = permute_int8(rows, none)
    assert packed.shape == (0, 16)
    assert dequantize_rows(packed, scales, torch.float16).shape == (0, 16)


@pytest.mark.parametrize("max_ctas", [None, 3])
@pytest.mark.parametrize("dtype_name", [*half_dtypes(), "float32", "uint8"])
@pytest.mark.parametrize("width", [16, 48, 2048, 7168])
def test_permute_copies_rows_of_any_dtype(
    width: int, dtype_name: str, max_ctas: int | None
) -> None:
    rows = (100 * rows_of(333, width, "float32").abs()).to(getattr(torch, dtype_name))
    row_index = torch.randint(333, (1001,), device="cuda", dtype=torch.int32)

    packed = permute(rows, row_index, max_ctas=max_ctas)

    assert torch.equal(packed, rows[row_index.long()])


@pytest.mark.parametrize("dtype_name", half_dtypes())
@pytest.mark.parametrize("width", [8, 40, 2048, 2056, 7168, 16384])
def test_int8_rows_have_the_bits_of_the_reference(width: int, dtype_name: str) -> None:
    rows = rows_of(201, width, dtype_name)
    rows[0] = 0.0
    rows[1, 3] = float("nan")
    rows[2, 5] = float("-inf")
    rows[3] *= 2.0**-14
    row_index = torch.randint(201, (400,), device="cuda", dtype=torch.int32)
    row_index[:4] = torch.arange(4)

    packed, scales = permute_int8(rows, row_index)
    back = dequantize_rows(packed, scales, rows.dtype)

    wanted, wanted_scales = reference.permute_int8(rows.cpu(), row_index.cpu())
    assert torch.equal(packed.cpu(), wanted)
    torch.testing.assert_close(scales.cpu(), wanted_scales, rtol=0.0, atol=0.0, equal_nan=True)
    wanted_back = reference.dequantize_rows(wanted, wanted_scales, rows.dtype)
    torch.testing.assert_close(back.cpu(), wanted_back, rtol=0.0, atol=0.0, equal_nan=True)
    order = torch.randint(400, (99,), device="cuda", dtype=torch.int32)
    picked = dequantize_rows(packed, scales, rows.dtype, order)
    torch.testing.assert_close(picked, back[order.long()], rtol=0.0, atol=0.0, equal_nan=True)


def fp8_card() -> None:
    """Skips the test on a card that has no e4m3."""
    if torch.cuda.get_device_capability() < E4M3_FROM:
        pytest.skip("e4m3 needs a card of compute capability 8.9 or later")


def assert_bits(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """The same codes to the bit, NaN and signs of zeros included, and the same scales."""
    codes, scales = (part.cpu() for part in found)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8))
    torch.testing.assert_close(scales, wanted[1], rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("max_ctas", [None, 3])
@pytest.mark.parametrize("group_size", [128, None])
@pytest.mark.parametrize("dtype_name", half_dtypes())
@pytest.mark.parametrize("width", [8, 40, 128, 136, 1024, 1416, 2048, 7168, 16384])
def test_e4m3_rows_have_the_bits_of_the_reference(
    width: int, dtype_name: str, group_size: int | None, max_ctas: int | None
) -> None:
    fp8_card()
    rows = rows_of(201, width, dtype_name)
    rows[0] = 0.0
    rows[1, 3] = float("nan")
    rows[2, width - 5] = float("-inf")
    rows[3] *= 2.0**-14
    rows[4, width // 2 :] *= 1000
    rows[5] = -0.0
    row_index = torch.randint(201, (400,), device="cuda", dtype=torch.int32)
    row_index[:6] = torch.arange(6)

    gathered = permute_fp8(rows, row_index, group_size=group_size, max_ctas=max_ctas)
    in_place = permute_fp8(rows, group_size=group_size, max_ctas=max_ctas)

    index = row_index.cpu()
    assert_bits(gathered, reference.permute_fp8(rows.cpu(), index, group_size=group_size))
    assert_bits(in_place, reference.permute_fp8(rows.cpu(), group_size=group_size))


@pytest.mark.parametrize("group_size", [128, None])
@pytest.mark.parametrize("dtype_name", half_dtypes())
def test_every_number_of_16_bits_has_the_code_of_the_reference(
    dtype_name: str, group_size: int | None
) -> None:
    fp8_card()
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    all_numbers = bits.view(getattr(torch, dtype_name))
    finite = all_numbers[all_numbers.isfinite()]
    order = torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))

    # Neighbours have an exponent in common; the others are scaled by any.
    for numbers in (all_numbers.view(512, 128), finite[order].view(-1, 128)):
        found = permute_fp8(numbers.cuda(), group_size=group_size)

        assert_bits(found, reference.permute_fp8(numbers, group_size=group_size))


def test_no_rows_make_no_codes() -> None:
    fp8_card()
    none = torch.empty(0, dtype=torch.int32, device="cuda")

    codes, scales = permute_fp8(rows_of(4, 136, "float16"), none)

    assert codes.shape == (0, 136)
    assert scales.shape == (0, 2)


def test_kernels_of_turing_make_no_e4m3() -> None:
    with (
        on_road(Road(torch.float16, TURING)),
        pytest.raises(MachineError, match="sm_75ptx cannot convert to e4m3"),
    ):
        permute_fp8(rows_of(4, 128, "float16"))


def test_rows_behind_the_count_have_no_index_and_are_left() -> None:
    rows = torch.randn(7, 64, device="cuda", dtype=torch.float16)
    index = torch.full((40,), 1 << 30, dtype=torch.int32, device="cuda")
    index[:5] = torch.tensor([6, 0, 3, 3, 1])
    count = torch.tensor([5], dtype=torch.int32, device="cuda")

    packed = permute(rows, index, row_count=count)

    torch.cuda.synchronize()  # an index that was followed would fault
    assert torch.equal(packed[:5], rows[index[:5].long()])
