"""permute and int8 rows against the reference, bit by bit; needs `make kernels`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightmoe.kernels import reference
from lightmoe.kernels.permute import dequantize_rows, permute, permute_int8
from tests.gpus import half_dtypes

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
