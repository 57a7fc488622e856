"""The router product's kernels on the host: few tokens and many, each tile, the same bits."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.route_cases import compile_host

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "cute_kernels"
SOURCES = ("topk_gate_mma.cuh", "topk_gate_tiles.cuh", "topk_gate_sizes.h", "light_ops.h")
SLICE = 256
TILES = [(16, 64), (16, 128), (32, 64), (32, 128), (64, 64), (64, 128), (128, 128)]
ERROR = 2e-6  # of the products' mass: float32 sums of 256, and of a few of those


@pytest.fixture(scope="module", params=[75, 80, 90])
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("router")
    for path in (*(HERE / "emulator/router").iterdir(), *(KERNELS / name for name in SOURCES)):
        shutil.copy(path, folder)  # the stand-ins beside the sources, which include them
    kernels = ctypes.CDLL(
        str(
            compile_host(
                folder / "router.cpp",
                folder / "router.so",
                f"-I{HERE / 'emulator'}",
                f"-I{HERE / 'emulator/cuda'}",
                f"-D__CUDA_ARCH__={request.param}0",
            )
        )
    )
    kernels.multiply_tiles.restype = kernels.multiply_slices.restype = ctypes.c_bool
    return kernels, request.param


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def rows(num_rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator).bfloat16()


def of_slices(kernels: ctypes.CDLL, hidden: Tensor, router: Tensor, grid: int) -> Tensor:
    """What the gate makes of the slices' sums: each half's in order, then the halves."""
    num_slices = -(-hidden.shape[1] // SLICE)
    partials = torch.full((len(hidden), num_slices, len(router)), torch.nan)
    sizes = (len(hidden), len(router), hidden.shape[1], grid)
    assert kernels.multiply_slices(pointer(hidden), pointer(router), pointer(partials), *sizes)
    assert partials.isfinite().all()
    halves = torch.zeros(2, len(hidden), len(router))
    for i in range(num_slices):
        halves[int(i >= (num_slices + 1) // 2)] += partials[:, i]
    return halves[0] + halves[1]


@pytest.mark.parametrize(("experts", "tokens"), TILES)
def test_every_tile_has_the_bits_of_the_slices(
    emulated: tuple[ctypes.CDLL, int], experts: int, tokens: int
) -> None:
    kernels, architecture = emulated
    if experts > 64 and architecture < 90:
        pytest.skip("a tile of two CTAs")
    num_tokens, num_experts, width = tokens + 3, experts // 2 + 3, 2 * SLICE + 24
    hidden, router = rows(num_tokens, width, 0), rows(num_experts, width, 1)
    logits = torch.full((num_tokens + 1, num_experts), torch.nan)

    sizes = (num_tokens, num_experts, width, experts, tokens, 2 if architecture >= 90 else 1)
    assert kernels.multiply_tiles(pointer(hidden), pointer(router), pointer(logits), *sizes)

    assert logits[-1].isnan().all()
    exact = hidden.double() @ router.double().t()
    mass = hidden.double().abs() @ router.double().abs().t()
    assert ((logits[:-1] - exact).abs() <= ERROR * mass).all()
    few = torch.cat([hidden[:2], hidden[-11:]])
    wanted = torch.cat([logits[:2], logits[-12:-1]])
    assert torch.equal(of_slices(kernels, few, router, 3), wanted)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "width", "grid"),
    [(1, 8, 8, 1), (9, 5, 264, 1), (17, 20, 1032, 2), (64, 16, 256, 4)],
)
def test_slices_of_any_sizes(
    emulated: tuple[ctypes.CDLL, int], num_tokens: int, num_experts: int, width: int, grid: int
) -> None:
    kernels, _ = emulated
    hidden, router = rows(num_tokens, width, 2), rows(num_experts, width, 3)

    logits = of_slices(kernels, hidden, router, grid)

    torch.testing.assert_close(
        logits.double(), hidden.double() @ router.double().t(), rtol=1e-5, atol=1e-4
    )
    last = of_slices(kernels, hidden[-1:].clone(), router, grid)
    assert torch.equal(logits[-1:], last)
