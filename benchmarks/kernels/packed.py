"""Quantised experts as quant_gemm takes them."""

from __future__ import annotations

import torch
from problem import Codes
from torch import Tensor

from lightmoe.quant.fragments import PackedMatrix, pack_weight


def pack_codes(codes: Codes, *, swiglu: bool) -> PackedMatrix:
    """Codes [E, N, D] in fragment order; an expert's codes and scales share one blob."""
    first = pack_weight(
        codes.values[0], codes.scales[0], None, codes.num_bits, codes.group_size, swiglu=swiglu
    )
    code_bytes, scale_bytes = first.packed.nbytes, first.scales.nbytes
    num_experts = codes.values.shape[0]
    blobs = torch.empty(
        num_experts, code_bytes + scale_bytes, dtype=torch.uint8, device=codes.values.device
    )
    packed = blobs[:, :code_bytes].unflatten(1, first.packed.shape[1:])
    scales: Tensor = blobs[:, code_bytes:].view(codes.scales.dtype)
    scales = scales.unflatten(1, first.scales.shape[1:])
    for expert in range(num_experts):
        matrix = pack_weight(
            codes.values[expert],
            codes.scales[expert],
            None,
            codes.num_bits,
            codes.group_size,
            swiglu=swiglu,
        )
        packed[expert], scales[expert] = matrix.packed[0], matrix.scales[0]
    return PackedMatrix(
        packed,
        scales,
        None,
        codes.num_bits,
        codes.group_size,
        first.num_features,
        first.depth,
        swiglu,
    )
