"""Weight-only quantisation: small integers, with one scale for each group along a row.

    value = scale * (code - zero)

`code` has 4 or 8 bits, `zero` is the middle of its range (symmetric) or an integer of the group's
own. The difference is exact in fp16 and bf16, so a value has a single rounding: the product's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe.errors import CheckpointError, UsageError

NUM_BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = (torch.float16, torch.bfloat16)

_ROWS_AT_ONCE = 512  # keeps the temporary fp32 copies of a row block in cache


def middle(num_bits: int) -> int:
    """The zero point of symmetric codes: 8 for 4 bits, 128 for 8."""
    return 1 << (num_bits - 1)


def check_format(num_bits: int, group_size: int, dtype: torch.dtype) -> None:
    """Raise UsageError unless the kernels take these codes and scales."""
    for name, value, known in (
        ("num_bits", num_bits, NUM_BITS),
        ("group_size", group_size, GROUP_SIZES),
        ("dtype", dtype, SCALE_DTYPES),
    ):
        if value not in known:
            raise UsageError(f"{name} is {value}; give one of {', '.join(map(str, known))}")


def quantize_groups(
    weight: Tensor,
    num_bits: int,
    group_size: int,
    *,
    symmetric: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight [N, D] to the nearest codes; groups run along D, the last may be shorter.

    Returns codes uint8 [N, D], scales of `dtype` [N, ceil(D / group_size)] and zeros uint8 of the
    same shape (None: symmetric). A symmetric scale spans the group either by absmax / (2^(b-1) - 1)
    or by -extreme / 2^(b-1), which may be negative and puts the extreme on the one code without a
    counterpart; each group takes the one with the lower squared error. Weights near the end of the
    range of `dtype` or beyond it saturate. Raises UsageError for an unknown format, CheckpointError
    for NaN or infinity.
    """
    check_format(num_bits, group_size, dtype)
    if not bool(weight.isfinite().all()):
        raise CheckpointError(
            f"the weight {list(weight.shape)} to quantise has NaN or infinity; mend the checkpoint"
        )
    depth = weight.shape[1]
    fill = -depth % group_size
    codes, scales, zeros = [], [], []
    for rows in weight.split(_ROWS_AT_ONCE):
        groups = torch.nn.functional.pad(rows.float(), (0, fill)).unflatten(1, (-1, group_size))
        if symmetric:
            part, scale = _symmetric(groups, num_bits, dtype)
        else:
            part, scale, zero = _asymmetric(groups, num_bits, dtype)
            zeros.append(zero)
        codes.append(part.flatten(1)[:, :depth])
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales), None if symmetric else torch.cat(zeros)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, num_bits: int, group_size: int
) -> Tensor:
    """The numbers that the kernels multiply with: codes [N, D] -> [N, D] of the scales' dtype."""
    depth = codes.shape[1]
    zero = torch.full_like(scales, middle(num_bits)) if zeros is None else zeros
    spread = scales.float().repeat_interleave(group_size, dim=1)[:, :depth]
    shift = zero.float().repeat_interleave(group_size, dim=1)[:, :depth]
    return (spread * (codes.float() - shift)).to(scales.dtype)


def _symmetric(groups: Tensor, num_bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [N, G, g] and scales [N, G] of groups [N, G, g]: the better of two scales."""
    half = middle(num_bits)
    low, high = groups.aminmax(dim=-1)
    extreme = torch.where(-low > high, low, high)
    best = _round_symmetric(groups, extreme.abs() / (half - 1), half, dtype)
    other = _round_symmetric(groups, extreme / -half, half, dtype)
    better = other[2] < best[2]
    codes = torch.where(better[..., None], other[0], best[0])
    return codes, torch.where(better, other[1], best[1])


def _round_symmetric(
    groups: Tensor, scale: Tensor, half: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, the scale as stored, and the squared error of each group."""
    stored = _store(scale, half, dtype)
    step = stored.float()[..., None]
    offsets = _nearest(groups, step).clamp_(-half, half - 1)
    error = (offsets * step - groups).square_().sum(dim=-1)
    return (offsets + half).to(torch.uint8), stored, error


def _asymmetric(groups: Tensor, num_bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, G, g], scales and zeros [N, G]; the range always holds 0, which stays exact."""
    top = (1 << num_bits) - 1
    low, high = groups.aminmax(dim=-1)
    low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
    stored = _store(high / top - low / top, top + 1, dtype)
    step = stored.float()
    zero = _nearest(-low, step).clamp_(0, top)
    codes = (_nearest(groups, step[..., None]) + zero[..., None]).clamp_(0, top)
    return codes.to(torch.uint8), stored, zero.to(torch.uint8)


def _store(scale: Tensor, num_steps: int, dtype: torch.dtype) -> Tensor:
    """The scale in the dtype that the kernels read, so small that no product overflows.

    `num_steps` is a power of two, at least the largest |code - zero|, so the limit is
    a number of the dtype and rounding cannot pass it.
    """
    limit = torch.finfo(dtype).max / num_steps
    return scale.clamp(-limit, limit).to(dtype)


def _nearest(values: Tensor, step: Tensor) -> Tensor:
    """values / step rounded to integers; 0 where the group is too small for a step in the dtype."""
    return torch.where(step == 0, 0.0, values / torch.where(step == 0, 1.0, step)).round_()
