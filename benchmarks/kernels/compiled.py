"""CUDA files of this folder, compiled by NVRTC for the current card at their first use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
INT_LIMIT = 1 << 31


@functools.cache
def kernel(source: str, name: str, shared_bytes: int = 0) -> Callable[..., None]:
    """The kernel of a file beside this one, called with (CTAs, threads, *arguments).

    Tensors go by address, numbers as C ints. `shared_bytes` of dynamic shared memory per CTA.
    """
    import numpy

    function = _module(source).get_function(name)
    if shared_bytes:
        function.max_dynamic_shared_size_bytes = shared_bytes

    def launch(grid: int | tuple[int, ...], threads: int, *arguments: object) -> None:
        values = [
            numpy.int64(value.data_ptr())
            if isinstance(value, torch.Tensor)
            else numpy.int32(_checked(value))
            for value in arguments
        ]
        blocks = grid if isinstance(grid, tuple) else (grid,)
        with _current_stream():
            function(blocks, (threads,), tuple(values), shared_mem=shared_bytes)

    return launch


@functools.cache
def _module(source: str) -> Any:
    import cupy

    code = (HERE / source).read_text(encoding="utf-8")
    return cupy.RawModule(code=code, options=("-std=c++17",))


class _Handle:
    """torch's current stream as the CUDA stream protocol has it."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


def _current_stream() -> Any:
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Handle())
    return cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)


def _checked(value: object) -> int:
    if not isinstance(value, int) or abs(value) >= INT_LIMIT:
        raise TypeError(f"{value!r} is no C int")
    return value
