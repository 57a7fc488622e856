"""Products of sorted pairs in e4m3, rows and weights both (W8A8), by liblight_ops on Hopper."""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe.errors import MachineError, UsageError
from lightmoe.kernels.checks import (
    HALF_DTYPES,
    require_cuda,
    require_dtype,
    require_multiple,
    require_rows,
    require_shape,
)
from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.library import address, library
from lightmoe.kernels.products import Plan, check_order, group_fields, plan_product
from lightmoe.kernels.reference import FP8_GROUP_SIZE, Fp8Weights

_STEM = "fp8_gemm"
_FIRST_ARCHITECTURE = 90
_ALIGNMENT_BYTES = 16


def fp8_gemm(
    rows: Tensor,
    row_scales: Tensor,
    experts: Fp8Weights,
    groups: PairGroups,
    row_index: Tensor | None = None,
    *,
    dtype: torch.dtype,
    pair_weight: Tensor | None = None,
    max_ctas: int | None = None,
    groups_settled: bool = False,
) -> Tensor:
    """[R, D] of float8_e4m3fn x e4m3 weights of S slots -> [P, num_features] of `dtype`.

    Scales by blocks of 128 or by rows and channels; D is a multiple of 16. The tensor cores add up
    128 of depth, with about 14 bits, and fp32 sums these: before rounding, within 1.5e-3 of the
    norm of what reference.fp8_gemm makes, which says the rest. `dtype` is float16, bfloat16, or
    float32 without SwiGLU. `max_ctas` and `groups_settled` as in grouped_gemm. UsageError names the
    tensor that does not fit; MachineError where the kernels are not sm_90's.
    """
    require_dtype(_STEM, "rows", rows, torch.float8_e4m3fn)
    require_shape(_STEM, "rows", rows, None, experts.depth)
    check_order(_STEM, rows, groups, row_index, pair_weight)
    _check_row_scales(row_scales, rows, experts)
    slot_bytes = _check_matrix(experts)
    if dtype not in HALF_DTYPES and (dtype != torch.float32 or experts.swiglu):
        other = "" if experts.swiglu else " or float32"
        raise UsageError(f"{_STEM}: dtype is {dtype}; it needs float16, bfloat16{other}")
    require_cuda(
        _STEM,
        rows=rows,
        row_scales=row_scales,
        codes=experts.codes,
        scales=experts.scales,
        slots=groups.slots,
        offsets=groups.offsets,
        row_index=row_index,
        pair_weight=pair_weight,
    )
    output = torch.empty(groups.num_pairs, experts.num_features, dtype=dtype, device=rows.device)
    if not groups.num_pairs:
        return output
    plan = plan_fp8(
        experts, groups.num_pairs, len(groups.slots), tokens_per_tile=groups.tokens_per_tile
    )
    library().launch(
        _STEM,
        rows.device,
        groups=group_fields(groups),
        tile=plan.tile_fields,
        dtype=HALF_DTYPES.get(dtype, HALF_DTYPES[torch.bfloat16]),
        rows=address(rows),
        row_scales=address(row_scales),
        pair_row=address(row_index),
        weights=address(experts.codes),
        scales=address(experts.scales),
        slot_bytes=slot_bytes,
        pair_weight=address(pair_weight),
        output=address(output),
        depth=experts.depth,
        num_features=experts.num_features,
        swiglu=experts.swiglu,
        output_float32=dtype == torch.float32,
        by_channels=experts.scaling == "channel",
        max_ctas=max_ctas or 0,
        groups_settled=groups_settled,
    )
    return output


def plan_fp8(
    experts: Fp8Weights,
    num_pairs: int,
    num_groups: int,
    *,
    tokens_per_tile: int | None = None,
) -> Plan:
    """The plan for products with these weights on their device; MachineError unless it has one."""
    device = experts.codes.device
    name = library().architecture_of(device)
    if int(name.removesuffix("ptx")) < _FIRST_ARCHITECTURE:
        raise MachineError(
            f"{_STEM}: kernels for sm_{name} have no product of e4m3; it needs a card of compute"
            f" capability 9.0 and kernels for sm_{_FIRST_ARCHITECTURE}: take int8 or int4 weights"
        )
    return plan_product(
        device,
        torch.bfloat16,
        num_pairs,
        num_groups,
        experts.num_features,
        experts.depth,
        swiglu=experts.swiglu,
        deterministic=True,  # the kernel has no other way
        num_bits=8,
        tokens_per_tile=tokens_per_tile,
        row_bits=8,
    )


def _check_row_scales(row_scales: Tensor, rows: Tensor, experts: Fp8Weights) -> None:
    """UsageError unless the scales are of these rows, and of the weights' kind."""
    require_dtype(_STEM, "row_scales", row_scales, torch.float32)
    if experts.scaling == "channel":
        require_shape(_STEM, "row_scales", row_scales, len(rows))
    else:
        num_groups = -(-experts.depth // FP8_GROUP_SIZE)
        require_shape(_STEM, "row_scales", row_scales, len(rows), num_groups)
    if not row_scales.is_contiguous():
        raise UsageError(f"{_STEM}: row_scales has gaps; give .contiguous()")


def _check_matrix(experts: Fp8Weights) -> int:
    """Bytes from one slot to the next; UsageError unless the kernel takes these parts."""
    codes, scales = experts.codes, experts.scales
    require_multiple(_STEM, "codes", codes, 1, 16 if experts.swiglu else 8)
    require_rows(_STEM, "codes", codes)
    slot_bytes = codes.stride(0)
    if len(codes) and not scales[0].is_contiguous():
        raise UsageError(f"{_STEM}: a slot of scales has gaps; give it as quant/fp8.py lays it")
    if slot_bytes % _ALIGNMENT_BYTES:
        raise UsageError(
            f"{_STEM}: slots of codes are {slot_bytes} bytes apart, no multiple of"
            f" {_ALIGNMENT_BYTES}; lay them out as quant/fp8.py does"
        )
    scale_bytes = scales.stride(0) * scales.element_size()
    if len(codes) > 1 and scale_bytes != slot_bytes:
        raise UsageError(
            f"{_STEM}: slots of scales are {scale_bytes} bytes apart, those of codes {slot_bytes};"
            " give views of one blob for each slot"
        )
    return slot_bytes
