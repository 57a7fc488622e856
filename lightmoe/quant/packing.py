"""The one blob layout of an expert: what a slot holds, and what a migration moves.

    [ gate F x D | up F x D | down D x F ]      row-major, one dtype, no padding
    [ gate_up: codes | scales | zeros || down: codes | scales | zeros ]     quantised, in bytes

Codes, scales and zeros (asymmetric only) lie as lightmoe/quant/fragments.py says; each part begins
on a cache line of the GPU. An expert in e4m3: lightmoe/quant/fp8.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.quant.fragments import PackedMatrix, PackedShape, pack_weight
from lightmoe.quant.quantize import check_format, quantize_groups

_PART_ALIGNMENT_BYTES = 128
_Matrix = TypeVar("_Matrix")


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Sizes of one expert: D model width, F expert width."""

    hidden_size: int
    expert_size: int

    @property
    def num_elements(self) -> int:
        """Elements of one blob."""
        return 3 * self.hidden_size * self.expert_size

    def views(self, blobs: Tensor) -> tuple[Tensor, Tensor]:
        """Blobs [S, elements] as gate_up [S, 2F, D] and down [S, D, F], sharing memory."""
        border = 2 * self.hidden_size * self.expert_size
        gate_up = blobs[:, :border].unflatten(1, (2 * self.expert_size, self.hidden_size))
        down = blobs[:, border:].unflatten(1, (self.hidden_size, self.expert_size))
        return gate_up, down

    def write(self, blob: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Fill one blob [elements] from gate, up [F, D] and down [D, F]."""
        gate_up_view, down_view = self.views(blob.unsqueeze(0))
        gate_up_view[0, : self.expert_size] = gate
        gate_up_view[0, self.expert_size :] = up
        down_view[0] = down


@dataclass(frozen=True, slots=True)
class QuantizedExpertLayout:
    """Sizes of one quantised expert: D model width, F expert width, and its format.

    `dtype` is that of the scales and of the activations, fp16 or bf16. Raises UsageError for a
    format that no kernel takes.
    """

    hidden_size: int
    expert_size: int
    num_bits: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype

    def __post_init__(self) -> None:
        check_format(self.num_bits, self.group_size, self.dtype)

    @property
    def num_elements(self) -> int:
        """Elements of one blob: bytes, for its dtype is uint8."""
        return sum(aligned(size) for shape in self._shapes for size in self._part_bytes(shape))

    def views(self, blobs: Tensor) -> tuple[PackedMatrix, PackedMatrix]:
        """Blobs uint8 [S, bytes] as gate_up (swiglu) and down of all S slots, sharing memory."""
        begin = 0
        matrices = []
        for shape in self._shapes:
            parts = []
            for num_bytes in self._part_bytes(shape):
                parts.append(blobs[:, begin : begin + num_bytes])
                begin += aligned(num_bytes)
            matrices.append(self._matrix(shape, *parts))
        gate_up, down = matrices
        return gate_up, down

    def write(self, blob: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Quantise one expert into a blob uint8 [bytes]: gate, up [F, D] and down [D, F]."""
        self.write_packed(
            blob, self._quantize(torch.cat([gate, up]), swiglu=True), self._quantize(down)
        )

    def write_packed(self, blob: Tensor, gate_up: PackedMatrix, down: PackedMatrix) -> None:
        """Fill one blob uint8 [bytes] with an expert packed already: matrices of one slot each.

        Raises UsageError where a matrix is not of this layout.
        """
        for source, target in fitting((gate_up, down), self.views(blob.unsqueeze(0)), _format):
            target.packed.copy_(source.packed)
            target.scales.copy_(source.scales)
            if target.zeros is not None and source.zeros is not None:
                target.zeros.copy_(source.zeros)

    @property
    def _shapes(self) -> tuple[PackedShape, PackedShape]:
        return (
            PackedShape(self.expert_size, self.hidden_size, self.num_bits, self.group_size, True),
            PackedShape(self.hidden_size, self.expert_size, self.num_bits, self.group_size, False),
        )

    def _part_bytes(self, shape: PackedShape) -> tuple[int, ...]:
        """Bytes of the codes, the scales and, if asymmetric, the zeros of one matrix."""
        scale_bytes = math.prod(shape.scales) * self.dtype.itemsize
        return (math.prod(shape.packed), scale_bytes) + (() if self.symmetric else (scale_bytes,))

    def _matrix(self, shape: PackedShape, packed: Tensor, *numbers: Tensor) -> PackedMatrix:
        scales, *zeros = (part.view(self.dtype).unflatten(1, shape.scales) for part in numbers)
        return PackedMatrix(
            packed.unflatten(1, shape.packed),
            scales,
            zeros[0] if zeros else None,
            self.num_bits,
            self.group_size,
            shape.num_features,
            shape.depth,
            shape.swiglu,
        )

    def _quantize(self, weight: Tensor, *, swiglu: bool = False) -> PackedMatrix:
        parts = quantize_groups(
            weight, self.num_bits, self.group_size, symmetric=self.symmetric, dtype=self.dtype
        )
        return pack_weight(*parts, self.num_bits, self.group_size, swiglu=swiglu)


def aligned(num_bytes: int) -> int:
    """Bytes from where a part of so many begins to where the next one does."""
    return num_bytes + -num_bytes % _PART_ALIGNMENT_BYTES


def fitting(
    sources: tuple[_Matrix, _Matrix],
    targets: tuple[_Matrix, _Matrix],
    describe: Callable[[_Matrix], str],
) -> Iterator[tuple[_Matrix, _Matrix]]:
    """Gate_up and down beside their places in a blob; UsageError where one's format is another."""
    for name, source, target in zip(("gate_up", "down"), sources, targets, strict=True):
        found, wanted = describe(source), describe(target)
        if found != wanted:
            raise UsageError(f"{name} is {found}; the slots of this layout hold {wanted}")
        yield source, target


def _format(matrix: PackedMatrix) -> str:
    """What must agree for one matrix's parts to fit another's."""
    zeros = "symmetric" if matrix.zeros is None else "with zeros"
    dtype = str(matrix.scales.dtype).removeprefix("torch.")
    rows = f"2 x {matrix.num_features}" if matrix.swiglu else f"{matrix.num_features}"
    return f"{rows} x {matrix.depth} int{matrix.num_bits}g{matrix.group_size} {zeros} {dtype}"
