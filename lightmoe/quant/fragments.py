"""Quantised weights in the order in which a warp's lanes feed them to the tensor cores.

A weight matrix [N, D] is cut into blocks of 16 rows x 64 of depth, padded with values of 0. Of a
block, lane l = 4g + t holds what registers a0 to a3 of mma.m16n8k16 (or of two m16n8k8) take in
four steps s of 16 of depth (PTX ISA, "Matrix Fragments for mma.m16n8k16"), lo before hi:

    a0: row g,     depth 16s + 2t, + 1        a2: row g,     depth 16s + 8 + 2t, + 1
    a1: row g + 8, depth 16s + 2t, + 1        a3: row g + 8, depth 16s + 8 + 2t, + 1

    4 bits   [N/16, D/64, 32 lanes, 16 bytes]: word s of 4 bytes is step s; nibble j of it is the
             lo of a_j and nibble j + 4 the hi, so that (word >> 4j) & 0x000f000f is the pair a_j
    8 bits   [N/16, D/64, 2, 32 lanes, 16 bytes]: each half of the depth has 2 steps x 2 words;
             word 0 is a0.lo, a0.hi, a1.lo, a1.hi, word 1 the same of a2 and a3
    scales   [N/16, groups, 16 rows], groups = ceil(padded D / group_size); zeros alike, as numbers

With SwiGLU a block's 16 rows are 8 gate rows and the 8 up rows beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.quant.quantize import check_format, dequantize, middle

BLOCK_ROWS = 16
BLOCK_DEPTH = 64

# A block's axes: h row + 8, g and t the lane, s the step (c which 32, r the step in it), k depth
# + 8 (register a_(2k + h)), e lo or hi of a register.
_ROW_AXES = (2, 8)  # h g
_FOUR_BIT_AXES = (4, 2, 4, 2)  # s k t e
_EIGHT_BIT_AXES = (2, 2, 2, 4, 2)  # c r k t e


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One matrix of each of S slots, packed; the tensors may be views of the slots' blobs.

    `num_features` counts the columns of the product, without padding: N, or F with swiglu (then N
    is 2F). `depth` is D without padding.
    """

    packed: Tensor  # uint8 [S, N/16, D/64, 32, 16], or [S, N/16, D/64, 2, 32, 16] for 8 bits
    scales: Tensor  # fp16 or bf16 [S, N/16, groups, 16]
    zeros: Tensor | None  # the shape and dtype of scales; None: symmetric
    num_bits: int
    group_size: int
    num_features: int
    depth: int
    swiglu: bool

    def dense(self, slot: int) -> Tensor:
        """The numbers of one slot's matrix: [N, D] of the scales' dtype, gate rows before up."""
        codes, scales, zeros = unpack_weight(self, slot)
        return dequantize(codes, scales, zeros, self.num_bits, self.group_size)


@dataclass(frozen=True, slots=True)
class PackedShape:
    """Sizes of one packed matrix: what its tensors' shapes follow from."""

    num_features: int
    depth: int
    num_bits: int
    group_size: int
    swiglu: bool

    @property
    def num_blocks(self) -> int:
        """Blocks of 16 rows."""
        return -(-self.num_features // (BLOCK_ROWS // 2 if self.swiglu else BLOCK_ROWS))

    @property
    def packed(self) -> tuple[int, ...]:
        """Shape of the codes of one slot, in bytes."""
        halves = (2,) if self.num_bits == 8 else ()
        return (self.num_blocks, -(-self.depth // BLOCK_DEPTH), *halves, 32, 16)

    @property
    def scales(self) -> tuple[int, int, int]:
        """Shape of the scales, and of the zeros, of one slot."""
        padded = self.depth + -self.depth % BLOCK_DEPTH
        return (self.num_blocks, -(-padded // self.group_size), BLOCK_ROWS)


def pack_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    num_bits: int,
    group_size: int,
    *,
    swiglu: bool = False,
) -> PackedMatrix:
    """Pack what quantize_groups returns, as a matrix of one slot (S = 1).

    With swiglu the N = 2F rows are F gate rows, then F up rows. Raises UsageError where shapes do
    not belong together.
    """
    num_rows, depth = codes.shape
    check_format(num_bits, group_size, scales.dtype)
    _check_groups("scales", scales, codes, group_size)
    if zeros is not None:
        _check_groups("zeros", zeros, codes, group_size)
    if swiglu and num_rows % 2:
        raise UsageError(f"codes has {num_rows} rows; with swiglu give gate rows, then as many up")
    num_features = num_rows // 2 if swiglu else num_rows
    shape = PackedShape(num_features, depth, num_bits, group_size, swiglu)
    zero = torch.full_like(scales, middle(num_bits), dtype=torch.uint8) if zeros is None else zeros
    blocks = _rows_to_blocks(_pad_depth(codes, zero), middle(num_bits), swiglu)
    zero_blocks = None
    if zeros is not None:
        zero_blocks = _groups_to_blocks(zeros.to(scales.dtype), middle(num_bits), shape)
    return PackedMatrix(
        (_pack_four if num_bits == 4 else _pack_eight)(blocks).view(1, *shape.packed),
        _groups_to_blocks(scales, 0, shape),
        zero_blocks,
        num_bits,
        group_size,
        num_features,
        depth,
        swiglu,
    )


def unpack_weight(matrix: PackedMatrix, slot: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros of one slot, as pack_weight took them."""
    num_groups = -(-matrix.depth // matrix.group_size)
    packed = matrix.packed[slot]
    blocks = _unpack_four(packed) if matrix.num_bits == 4 else _unpack_eight(packed)
    codes = _blocks_to_rows(blocks, matrix)[:, : matrix.depth]
    scales, zeros = (
        None
        if part is None
        else _blocks_to_rows(part[slot].transpose(1, 2), matrix)[:, :num_groups]
        for part in (matrix.scales, matrix.zeros)
    )
    assert scales is not None
    return codes, scales, None if zeros is None else zeros.to(torch.uint8)


def _check_groups(name: str, part: Tensor, codes: Tensor, group_size: int) -> None:
    expected = [codes.shape[0], -(-codes.shape[1] // group_size)]
    if list(part.shape) != expected:
        raise UsageError(
            f"{name} is {list(part.shape)}; codes {list(codes.shape)} in groups of {group_size} "
            f"need {expected}"
        )


def _pad_depth(codes: Tensor, zero: Tensor) -> Tensor:
    """Codes with D filled up to whole blocks by codes that stand for 0 in the last group."""
    fill = -codes.shape[1] % BLOCK_DEPTH
    return torch.cat([codes, zero[:, -1:].expand(-1, fill)], dim=1)


def _rows_to_blocks(rows: Tensor, fill: int, swiglu: bool) -> Tensor:
    """Rows [N, C] as blocks of rows [N/16, 16, C], filled up by rows of `fill`."""
    parts = rows.unflatten(0, (2, -1)) if swiglu else rows[None]  # [2 or 1, F, C]
    height = BLOCK_ROWS // len(parts)
    pad = (0, 0, 0, -parts.shape[1] % height)
    blocks: Tensor = torch.nn.functional.pad(parts, pad, value=fill).unflatten(1, (-1, height))
    return blocks.transpose(0, 1).flatten(1, 2)


def _blocks_to_rows(blocks: Tensor, matrix: PackedMatrix) -> Tensor:
    """The inverse of _rows_to_blocks."""
    parts: Tensor = blocks.unflatten(1, (2 if matrix.swiglu else 1, -1))
    return parts.transpose(0, 1).flatten(1, 2)[:, : matrix.num_features].flatten(0, 1)


def _groups_to_blocks(groups: Tensor, fill: int, shape: PackedShape) -> Tensor:
    """Scales or zeros [N, groups] as [1, N/16, groups, 16]."""
    pad = (0, shape.scales[1] - groups.shape[1])
    filled = torch.nn.functional.pad(groups, pad, value=fill)
    return _rows_to_blocks(filled, fill, shape.swiglu).transpose(1, 2).contiguous()[None]


def _pack_four(blocks: Tensor) -> Tensor:
    """Blocks of rows [B, 16, D] -> [B, D/64, 32, 16]: a byte is rows g (low) and g + 8 (high)."""
    axes: Tensor = blocks.unflatten(2, (-1, *_FOUR_BIT_AXES)).unflatten(1, _ROW_AXES)
    nibbles = axes.permute(1, 0, 3, 2, 6, 4, 7, 5)  # h | B, D/64, g, t, s, e, k
    return (nibbles[0] | nibbles[1] << 4).contiguous()


def _unpack_four(packed: Tensor) -> Tensor:
    """The inverse of _pack_four."""
    axes: Tensor = packed.unflatten(3, (4, 2, 2)).unflatten(2, (8, 4))  # B, D/64, g, t, s, e, k
    nibbles = torch.stack([axes & 15, axes >> 4], dim=1)  # B, h, D/64, g, t, s, e, k
    return nibbles.permute(0, 1, 3, 2, 5, 7, 4, 6).flatten(3).flatten(1, 2)


def _pack_eight(blocks: Tensor) -> Tensor:
    """Blocks of rows [B, 16, D] -> [B, D/64, 2, 32, 16]."""
    axes: Tensor = blocks.unflatten(2, (-1, *_EIGHT_BIT_AXES)).unflatten(1, _ROW_AXES)
    # B, h, g, D/64, c, r, k, t, e -> B, D/64, c, g, t, r, k, h, e
    return axes.permute(0, 3, 4, 2, 7, 5, 6, 1, 8).contiguous()


def _unpack_eight(packed: Tensor) -> Tensor:
    """The inverse of _pack_eight."""
    axes: Tensor = packed.unflatten(4, (2, 2, 2, 2)).unflatten(3, (8, 4))
    # B, D/64, c, g, t, r, k, h, e -> B, h, g, D/64, c, r, k, t, e
    return axes.permute(0, 7, 3, 1, 2, 5, 6, 4, 8).flatten(3).flatten(1, 2)
