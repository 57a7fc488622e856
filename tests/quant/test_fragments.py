"""Packing: an element-by-element walk of the fragment table, and everything back as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.quant.fragments import PackedMatrix, PackedShape, pack_weight, unpack_weight
from lightmoe.quant.quantize import GROUP_SIZES, NUM_BITS, SCALE_DTYPES, dequantize, middle


def random_parts(
    num_rows: int,
    depth: int,
    num_bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros of no particular weight."""
    generator = torch.Generator().manual_seed(seed)
    groups = (num_rows, -(-depth // group_size))
    top = 1 << num_bits
    codes = torch.randint(0, top, (num_rows, depth), generator=generator, dtype=torch.uint8)
    scales = torch.randn(groups, generator=generator).to(dtype)
    zeros = torch.randint(0, top, groups, generator=generator, dtype=torch.uint8)
    return codes, scales, None if symmetric else zeros


def row_in_block(matrix: PackedMatrix, block: int, row: int) -> int | None:
    """Row of the weight that a block's row holds; None: padding."""
    if not matrix.swiglu:
        feature = 16 * block + row
        return feature if feature < matrix.num_features else None
    feature = 8 * block + row % 8
    if feature >= matrix.num_features:
        return None
    return feature if row < 8 else matrix.num_features + feature


def code_at(matrix: PackedMatrix, block: int, deep: int, lane: int, step: int, value: int) -> int:
    """What a lane holds as value 0 to 7 (a0.lo, a0.hi, ... a3.hi) of a step of 16 of depth."""
    register, high = divmod(value, 2)
    if matrix.num_bits == 4:
        own = matrix.packed[0, block, deep, lane].tolist()
        word = int.from_bytes(bytes(own[4 * step : 4 * step + 4]), "little")
        return word >> 4 * (register + 4 * high) & 15
    own = matrix.packed[0, block, deep, step // 2, lane].tolist()
    return own[8 * (step % 2) + 4 * (register // 2) + 2 * (register % 2) + high]


@pytest.mark.parametrize("num_bits", NUM_BITS)
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_code_lies_where_the_fragment_table_says(
    num_bits: int, swiglu: bool, symmetric: bool, group_size: int
) -> None:
    codes, scales, zeros = random_parts(26, 150, num_bits, group_size, symmetric)
    matrix = pack_weight(codes, scales, zeros, num_bits, group_size, swiglu=swiglu)
    seen = torch.zeros_like(codes, dtype=torch.int64)

    for block in range(2):
        for deep in range(3):
            for lane in range(32):
                for step in range(4):
                    for value in range(8):
                        row = row_in_block(matrix, block, lane // 4 + 8 * (value // 2 % 2))
                        depth = 64 * deep + 16 * step + 8 * (value // 4) + lane % 4 * 2 + value % 2
                        code = code_at(matrix, block, deep, lane, step, value)
                        if row is None:
                            assert code == middle(num_bits)
                        elif depth < 150:
                            assert code == codes[row, depth]
                            seen[row, depth] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("swiglu", [False, True])
def test_scales_and_zeros_stand_in_the_order_of_their_rows(swiglu: bool) -> None:
    codes, scales, zeros = random_parts(26, 150, 4, 32, symmetric=False)
    assert zeros is not None
    matrix = pack_weight(codes, scales, zeros, 4, 32, swiglu=swiglu)
    assert matrix.zeros is not None
    assert matrix.scales.shape == matrix.zeros.shape == (1, 2, 6, 16)

    for block in range(2):
        for row in range(16):
            source = row_in_block(matrix, block, row)
            padded = torch.zeros(6, dtype=torch.float16)
            if source is not None:
                padded[:5] = scales[source]
                assert torch.equal(matrix.zeros[0, block, :5, row], zeros[source].half())
            assert torch.equal(matrix.scales[0, block, :, row], padded)


SIZES = {
    "num_rows": st.integers(1, 40),
    "depth": st.integers(1, 200),
    "num_bits": st.sampled_from(NUM_BITS),
    "group_size": st.sampled_from(GROUP_SIZES),
    "symmetric": st.booleans(),
    "dtype": st.sampled_from(SCALE_DTYPES),
    "seed": st.integers(0, 99),
}


@settings(deadline=None, derandomize=True, max_examples=100)
@given(parts=st.fixed_dictionaries(SIZES), swiglu=st.booleans())
def test_what_was_packed_comes_back(parts: dict[str, Any], swiglu: bool) -> None:
    parts["num_rows"] *= 2 if swiglu else 1
    codes, scales, zeros = random_parts(**parts)
    num_bits, group_size = parts["num_bits"], parts["group_size"]

    matrix = pack_weight(codes, scales, zeros, num_bits, group_size, swiglu=swiglu)
    back_codes, back_scales, back_zeros = unpack_weight(matrix, 0)

    assert torch.equal(back_codes, codes)
    assert torch.equal(back_scales, scales)
    if zeros is None:
        assert back_zeros is None
    else:
        assert back_zeros is not None
        assert torch.equal(back_zeros, zeros)
    assert torch.equal(matrix.dense(0), dequantize(codes, scales, zeros, num_bits, group_size))
    shape = PackedShape(matrix.num_features, parts["depth"], num_bits, group_size, swiglu)
    assert matrix.packed.shape == (1, *shape.packed)
    assert matrix.scales.shape == (1, *shape.scales)
    assert matrix.packed.is_contiguous()
    assert matrix.scales.is_contiguous()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(parts=st.fixed_dictionaries(SIZES), swiglu=st.booleans())
def test_padding_stands_for_zero(parts: dict[str, Any], swiglu: bool) -> None:
    parts["num_rows"] *= 2 if swiglu else 1
    codes, scales, zeros = random_parts(**parts)
    matrix = pack_weight(
        codes, scales, zeros, parts["num_bits"], parts["group_size"], swiglu=swiglu
    )
    num_features, depth = matrix.num_features, matrix.depth

    num_padded = matrix.packed.shape[1] * (8 if swiglu else 16)
    whole = replace(matrix, num_features=num_padded, depth=matrix.packed.shape[2] * 64).dense(0)

    halves = whole.view(2 if swiglu else 1, num_padded, -1)
    assert torch.equal(halves[:, :num_features, :depth].flatten(0, 1), matrix.dense(0))
    assert (halves[:, num_features:] == 0).all()
    assert (halves[:, :, depth:] == 0).all()


@pytest.mark.parametrize("num_bits", NUM_BITS)
def test_slots_are_read_each_on_its_own(num_bits: int) -> None:
    packed = [
        pack_weight(*random_parts(20, 70, num_bits, 32, False, seed=seed), num_bits, 32)
        for seed in range(3)
    ]
    joined = replace(
        packed[0],
        packed=torch.cat([one.packed for one in packed]),
        scales=torch.cat([one.scales for one in packed]),
        zeros=torch.cat([one.zeros for one in packed if one.zeros is not None]),
    )

    for slot, one in enumerate(packed):
        assert torch.equal(joined.dense(slot), one.dense(0))


def test_parts_that_do_not_belong_together_are_refused() -> None:
    codes, scales, zeros = random_parts(17, 70, 4, 32, symmetric=False)

    with pytest.raises(UsageError, match=r"scales is \[17, 2\]; .* need \[17, 3\]"):
        pack_weight(codes, scales[:, :2], zeros, 4, 32)
    with pytest.raises(UsageError, match=r"zeros is \[16, 3\]; .* need \[17, 3\]"):
        pack_weight(codes, scales, random_parts(16, 70, 4, 32, False)[2], 4, 32)
    with pytest.raises(UsageError, match="codes has 17 rows; with swiglu"):
        pack_weight(codes, scales, zeros, 4, 32, swiglu=True)
    with pytest.raises(UsageError, match=r"dtype is torch.float32"):
        pack_weight(codes, scales.float(), zeros, 4, 32)
