"""What the wrappers of liblight_ops ask of their tensors, before a pointer leaves Python."""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe.errors import UsageError

HALF_DTYPES = {torch.float16: 0, torch.bfloat16: 1}
"""The dtypes of the matrix kernels, and their numbers in light_ops.h."""

_ALIGNMENT_BYTES = 16


def is_native(tensor: Tensor) -> bool:
    """Whether an operator on this tensor is liblight_ops' work: 16 bits, on a GPU."""
    return tensor.is_cuda and tensor.dtype in HALF_DTYPES


def require_dtype(stem: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """UsageError unless the tensor has that dtype."""
    if tensor.dtype != dtype:
        raise UsageError(f"{stem}: {name} is {tensor.dtype}; it needs {dtype}")


def require_half(stem: str, name: str, tensor: Tensor) -> None:
    """UsageError unless the tensor is float16 or bfloat16."""
    if tensor.dtype not in HALF_DTYPES:
        raise UsageError(f"{stem}: {name} is {tensor.dtype}; it needs float16 or bfloat16")


def require_shape(stem: str, name: str, tensor: Tensor, *shape: int | None) -> None:
    """UsageError unless the sizes are these; None takes any."""
    found = tensor.shape
    if len(found) != len(shape):
        raise UsageError(
            f"{stem}: {name} has {len(found)} dimensions {list(found)}; it needs {len(shape)}"
        )
    for axis, wanted in enumerate(shape):
        if wanted is not None and found[axis] != wanted:
            raise UsageError(
                f"{stem}: {name} has size {found[axis]} in dimension {axis} of {list(found)};"
                f" it needs {wanted}"
            )


def require_multiple(stem: str, name: str, tensor: Tensor, axis: int, multiple: int) -> None:
    """UsageError unless that size is a multiple of `multiple`."""
    if tensor.shape[axis] % multiple:
        raise UsageError(
            f"{stem}: {name} has size {tensor.shape[axis]} in dimension {axis % tensor.dim()} of"
            f" {list(tensor.shape)}; it needs a multiple of {multiple}"
        )


def require_rows(stem: str, name: str, tensor: Tensor) -> None:
    """UsageError unless the last two dimensions are rows without gaps that begin at 16 bytes."""
    gaps = not tensor.is_contiguous() and (
        tensor.stride(-1) != 1 or tensor.stride(-2) != tensor.shape[-1]
    )
    if gaps and tensor.numel():
        raise UsageError(
            f"{stem}: {name} has strides {list(tensor.stride())} for {list(tensor.shape)};"
            " its rows need to follow each other: give .contiguous()"
        )
    require_aligned(stem, name, tensor)


def require_aligned(stem: str, name: str, tensor: Tensor) -> None:
    """UsageError unless the tensor begins at 16 bytes."""
    if tensor.data_ptr() % _ALIGNMENT_BYTES:
        raise UsageError(
            f"{stem}: {name} begins at an address that is no multiple of {_ALIGNMENT_BYTES};"
            " give a copy"
        )


def require_cuda(stem: str, **tensors: Tensor | None) -> None:
    """UsageError unless all of them (None is left out) are on one GPU."""
    first: int | None = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        number = tensor.get_device()  # -1: the host
        first = number if first is None else first
        if number != first or number < 0:
            break
    else:
        return
    device: torch.device | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        device = device or tensor.device
        if not tensor.is_cuda or tensor.device != device:
            wanted = "a CUDA device" if device.type != "cuda" else str(device)
            raise UsageError(f"{stem}: {name} is on {tensor.device}; it needs {wanted}")
