"""Products of sorted pairs with quantised weights, by liblight_ops."""

from __future__ import annotations

from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.kernels.checks import HALF_DTYPES, require_cuda, require_dtype, require_shape
from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.library import address, library
from lightmoe.kernels.products import Plan, check_pairs, group_fields, plan_product, split_scratch
from lightmoe.kernels.reference import QuantizedMatrix

_STEM = "quant_gemm"


def quant_gemm(
    rows: Tensor,
    experts: QuantizedMatrix,
    groups: PairGroups,
    row_index: Tensor | None = None,
    *,
    pair_weight: Tensor | None = None,
    max_ctas: int | None = None,
    deterministic: bool = True,
    groups_settled: bool = False,
) -> Tensor:
    """[R, D] x packed weights of S slots -> [P, num_features]; rounded once, from fp32 sums.

    `max_ctas` and `groups_settled` as in grouped_gemm. UsageError names the tensor that does not
    fit. The rest is reference.quant_gemm's.
    """
    require_shape(_STEM, "rows", rows, None, experts.depth)
    check_pairs(_STEM, rows, groups, row_index, pair_weight)
    slot_bytes = _check_matrix(experts, rows)
    require_cuda(
        _STEM,
        rows=rows,
        packed=experts.packed,
        scales=experts.scales,
        zeros=experts.zeros,
        slots=groups.slots,
        offsets=groups.offsets,
        row_index=row_index,
        pair_weight=pair_weight,
    )
    output = rows.new_empty(groups.num_pairs, experts.num_features)
    if not groups.num_pairs:
        return output
    plan = plan_quantized(
        experts,
        groups.num_pairs,
        len(groups.slots),
        deterministic=deterministic,
        tokens_per_tile=groups.tokens_per_tile,
    )
    split_sums, split_tickets = split_scratch(plan, rows.device)
    library().launch(
        _STEM,
        rows.device,
        groups=group_fields(groups),
        tile=plan.tile_fields,
        dtype=HALF_DTYPES[rows.dtype],
        rows=address(rows),
        pair_row=address(row_index),
        weights=address(experts.packed),
        scales=address(experts.scales),
        zeros=address(experts.zeros),
        slot_bytes=slot_bytes,
        pair_weight=address(pair_weight),
        output=address(output),
        depth=experts.depth,
        num_features=experts.num_features,
        swiglu=experts.swiglu,
        output_float32=False,
        num_bits=experts.num_bits,
        group_size=experts.group_size,
        max_ctas=max_ctas or 0,
        groups_settled=groups_settled,
        split_sums=address(split_sums),
        split_tickets=address(split_tickets),
        depth_splits=plan.depth_splits,
    )
    return output


def plan_quantized(
    experts: QuantizedMatrix,
    num_pairs: int,
    num_groups: int,
    *,
    deterministic: bool,
    tokens_per_tile: int | None = None,
) -> Plan:
    """The plan for products with these weights on their device."""
    return plan_product(
        experts.packed.device,
        experts.scales.dtype,
        num_pairs,
        num_groups,
        experts.num_features,
        experts.depth,
        swiglu=experts.swiglu,
        deterministic=deterministic,
        num_bits=experts.num_bits,
        tokens_per_tile=tokens_per_tile,
    )


def _check_matrix(experts: QuantizedMatrix, rows: Tensor) -> int:
    """Bytes from one slot to the next; UsageError unless the kernel takes these parts."""
    num_slots = len(experts.packed)
    parts = {"packed": experts.packed, "scales": experts.scales}
    require_dtype(_STEM, "scales", experts.scales, rows.dtype)
    if experts.zeros is not None:
        require_dtype(_STEM, "zeros", experts.zeros, rows.dtype)
        require_shape(_STEM, "zeros", experts.zeros, *experts.scales.shape)
        parts["zeros"] = experts.zeros
    slot_bytes = experts.packed.stride(0) * experts.packed.element_size()
    blocks = -(-experts.num_features // (8 if experts.swiglu else 16))
    depth_blocks = -(-experts.depth // 64)
    halves = (2,) if experts.num_bits == 8 else ()
    require_shape(_STEM, "packed", experts.packed, None, blocks, depth_blocks, *halves, 32, 16)
    num_groups = -(-depth_blocks * 64 // experts.group_size)
    require_shape(_STEM, "scales", experts.scales, num_slots, blocks, num_groups, 16)
    for name, part in parts.items():
        if num_slots and not part[0].is_contiguous():
            raise UsageError(f"{_STEM}: a slot of {name} has gaps; give it as packing.py lays it")
        part_bytes = part.stride(0) * part.element_size()
        if part.data_ptr() % 16 or part_bytes % 16:
            raise UsageError(
                f"{_STEM}: slots of {name} begin {part.data_ptr() % 16} bytes, and are"
                f" {part_bytes % 16} bytes, off a multiple of 16; lay them out as packing.py does"
            )
        if num_slots > 1 and part_bytes != slot_bytes:
            raise UsageError(
                f"{_STEM}: slots of {name} are {part_bytes} bytes apart, those of packed"
                f" {slot_bytes}; give views of one blob for each slot"
            )
    return slot_bytes
