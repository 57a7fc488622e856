"""Weights as e4m3 (8 bits: sign, 4 of exponent, 3 of fraction), scaled by blocks or channels.

    value = scale * code, with |code| <= 448

A block is 128 rows x 128 of depth (DeepSeek-V3 Technical Report, section 3.3.2), smaller at the
borders of the matrix; a channel is a row. Of F gate rows and F up rows each part has blocks of its
own. One expert's blob, in bytes, each part aligned to 128 of them:

    [ gate_up: codes [2F, D] | scales || down: codes [D, F] | scales ]

codes are row-major, scales float32 [2 ceil(F/128), ceil(D/128)] and [ceil(D/128), ceil(F/128)] by
blocks, [2F] and [D] by channels: gate before up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightmoe.errors import CheckpointError, UsageError
from lightmoe.quant.packing import aligned, fitting

BLOCK = 128
LARGEST = 448.0
CODE_DTYPE = torch.float8_e4m3fn

_ROWS_AT_ONCE = 4 * BLOCK  # keeps the temporary fp32 copies of a row block in cache

Scaling = Literal["block", "channel"]
"""What shares a scale: 128 x 128 weights, or a row."""


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """One matrix of each of S slots; the tensors may be views of the slots' blobs.

    With swiglu the N = 2F rows are F gate rows, then F up rows. A published checkpoint's tensors
    (codes, weight_scale_inv) go in as they are, with a first dimension of 1. Raises UsageError
    where codes and scales do not belong together.
    """

    codes: Tensor  # float8_e4m3fn [S, N, D]
    scales: Tensor  # float32 [S, blocks of rows, blocks of depth], or by channels [S, N]
    swiglu: bool

    def __post_init__(self) -> None:
        if self.codes.dtype != CODE_DTYPE or self.scales.dtype != torch.float32:
            raise UsageError(
                f"codes are {self.codes.dtype}, scales {self.scales.dtype};"
                f" give {CODE_DTYPE} and torch.float32"
            )
        if self.codes.dim() != 3 or self.scales.dim() not in (2, 3):
            raise UsageError(
                f"codes {list(self.codes.shape)} with scales {list(self.scales.shape)};"
                " give codes [S, N, D] with scales by blocks [S, N/128, D/128] or channels [S, N]"
            )
        if self.swiglu and self.codes.shape[1] % 2:
            raise UsageError(
                f"codes has {self.codes.shape[1]} rows; with swiglu give gate rows, then as many up"
            )
        shape = _scale_shape(self.num_features, self.depth, self.scaling, self.swiglu)
        expected = [len(self.codes), *shape]
        if list(self.scales.shape) != expected:
            raise UsageError(
                f"scales is {list(self.scales.shape)}; codes {list(self.codes.shape)}"
                f"{' with swiglu' if self.swiglu else ''} need {expected}"
            )

    @property
    def num_features(self) -> int:
        """Columns of the product: N, or F with swiglu."""
        return self.codes.shape[1] // (2 if self.swiglu else 1)

    @property
    def depth(self) -> int:
        """D, the summed dimension."""
        return self.codes.shape[2]

    @property
    def scaling(self) -> Scaling:
        """What shares a scale."""
        return "block" if self.scales.dim() == 3 else "channel"

    def scales_by_row(self, slot: int) -> Tensor:
        """One slot's scales, those of every row: float32 [N, ceil(D / 128)], by channels [N, 1]."""
        if self.scaling == "channel":
            return self.scales[slot, :, None]
        parts = self.scales[slot].chunk(2 if self.swiglu else 1)
        rows = [part.repeat_interleave(BLOCK, dim=0)[: self.num_features] for part in parts]
        return torch.cat(rows)

    def dense(self, slot: int) -> Tensor:
        """The numbers of one slot's matrix: float32 [N, D], gate rows before up."""
        scales = self.scales_by_row(slot)
        if self.scaling == "block":
            scales = scales.repeat_interleave(BLOCK, dim=1)[:, : self.depth]
        return self.codes[slot].float() * scales


def quantize_blocks(weight: Tensor, *, swiglu: bool = False) -> Fp8Matrix:
    """Round a weight [N, D] to codes with a scale for each 128 x 128, as a matrix of one slot.

    A scale is the block's largest magnitude / 448; a code is the nearest to weight / scale, 0 where
    the block is zeros. Raises CheckpointError for NaN or infinity.
    """
    return _quantize(weight, _round_blocks, swiglu)


def quantize_channels(weight: Tensor, *, swiglu: bool = False) -> Fp8Matrix:
    """quantize_blocks with a scale for each row of the weight [N, D]."""
    return _quantize(weight, _round_channels, swiglu)


@dataclass(frozen=True, slots=True)
class Fp8ExpertLayout:
    """Sizes of one expert in e4m3: D model width, F expert width, and what shares a scale."""

    hidden_size: int
    expert_size: int
    scaling: Scaling

    @property
    def num_elements(self) -> int:
        """Elements of one blob: bytes, for its dtype is uint8."""
        return sum(
            aligned(math.prod(codes)) + aligned(math.prod(scales) * torch.float32.itemsize)
            for codes, scales, _ in self._matrices
        )

    def views(self, blobs: Tensor) -> tuple[Fp8Matrix, Fp8Matrix]:
        """Blobs uint8 [S, bytes] as gate_up (swiglu) and down of all S slots, sharing memory."""
        begin = 0
        matrices = []
        for code_shape, scale_shape, swiglu in self._matrices:
            codes, begin = _part(blobs, begin, code_shape, CODE_DTYPE)
            scales, begin = _part(blobs, begin, scale_shape, torch.float32)
            matrices.append(Fp8Matrix(codes, scales, swiglu))
        gate_up, down = matrices
        return gate_up, down

    def write(self, blob: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Quantise one expert into a blob uint8 [bytes]: gate, up [F, D] and down [D, F]."""
        quantize = quantize_blocks if self.scaling == "block" else quantize_channels
        self.write_quantized(blob, quantize(torch.cat([gate, up]), swiglu=True), quantize(down))

    def write_quantized(self, blob: Tensor, gate_up: Fp8Matrix, down: Fp8Matrix) -> None:
        """Fill one blob uint8 [bytes] with an expert quantised already: matrices of one slot each.

        Raises UsageError where a matrix is not of this layout.
        """
        for source, target in fitting((gate_up, down), self.views(blob.unsqueeze(0)), _format):
            target.codes.copy_(source.codes)
            target.scales.copy_(source.scales)

    @property
    def _matrices(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...], bool], ...]:
        """Shapes of codes and scales of one slot, and swiglu, of gate_up and down."""
        width, expert_width = self.hidden_size, self.expert_size
        return (
            ((2 * expert_width, width), self._scales(expert_width, width, True), True),
            ((width, expert_width), self._scales(width, expert_width, False), False),
        )

    def _scales(self, num_features: int, depth: int, swiglu: bool) -> tuple[int, ...]:
        return _scale_shape(num_features, depth, self.scaling, swiglu)


def _scale_shape(num_features: int, depth: int, scaling: Scaling, swiglu: bool) -> tuple[int, ...]:
    """Shape of the scales of one slot."""
    num_parts = 2 if swiglu else 1
    if scaling == "channel":
        return (num_parts * num_features,)
    return (num_parts * -(-num_features // BLOCK), -(-depth // BLOCK))


def _part(
    blobs: Tensor, begin: int, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, int]:
    """Numbers [S, *shape] that begin at a byte of each blob, and where the next ones begin."""
    num_bytes = math.prod(shape) * dtype.itemsize
    numbers: Tensor = blobs[:, begin : begin + num_bytes].view(dtype).unflatten(1, shape)
    return numbers, begin + aligned(num_bytes)


def _format(matrix: Fp8Matrix) -> str:
    """What must agree for one matrix's parts to fit another's."""
    rows = f"2 x {matrix.num_features}" if matrix.swiglu else f"{matrix.num_features}"
    slots = "" if len(matrix.codes) == 1 else f" of {len(matrix.codes)} slots"
    return f"{rows} x {matrix.depth} e4m3 by {matrix.scaling}{slots}"


def _quantize(
    weight: Tensor, round_rows: Callable[[Tensor], tuple[Tensor, Tensor]], swiglu: bool
) -> Fp8Matrix:
    """Gate and up apart, as many rows at once as are whole blocks."""
    if not bool(weight.isfinite().all()):
        raise CheckpointError(
            f"the weight {list(weight.shape)} to quantise has NaN or infinity; mend the checkpoint"
        )
    if swiglu and len(weight) % 2:
        raise UsageError(
            f"weight has {len(weight)} rows; with swiglu give gate rows, then as many up"
        )
    parts = weight.chunk(2) if swiglu else (weight,)
    rounded = [round_rows(rows) for part in parts for rows in part.split(_ROWS_AT_ONCE)]
    codes, scales = zip(*rounded, strict=True)
    return Fp8Matrix(torch.cat(codes)[None], torch.cat(scales)[None], swiglu)


def _round_blocks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, D] and scales [ceil(n / 128), ceil(D / 128)] of rows [n, D]."""
    num_rows, depth = rows.shape
    padded = torch.nn.functional.pad(rows.float(), (0, -depth % BLOCK, 0, -num_rows % BLOCK))
    blocks: Tensor = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scales = blocks.abs().amax(dim=(1, 3)) / LARGEST
    codes = _nearest(blocks, scales[:, None, :, None]).flatten(2).flatten(0, 1)
    return codes[:num_rows, :depth], scales


def _round_channels(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, D] and scales [n] of rows [n, D]."""
    numbers = rows.float()
    scales = numbers.abs().amax(dim=1) / LARGEST
    return _nearest(numbers, scales[:, None]), scales


def _nearest(values: Tensor, scale: Tensor) -> Tensor:
    """Codes of values / scale; 0 where the values are too small for a scale in float32."""
    ratios = values / torch.where(scale == 0, 1.0, scale)
    return torch.where(scale == 0, 0.0, ratios.clamp_(-LARGEST, LARGEST)).to(CODE_DTYPE)
