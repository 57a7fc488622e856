"""add_norm on a GPU: the sum's bits, the norm within a rounding; needs `make kernels`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightmoe.kernels import add_norm, reference
from tests.kernels.pairs import Road

pytestmark = pytest.mark.gpu

EPSILON = 1e-5
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SIZES = [(1, 8), (5, 40), (3, 264), (7, 2048), (64, 4096), (777, 4096), (3, 5120), (2, 7168)]
SIZES += [(5, 8192), (3, 8200), (3, 16384), (2, 20000)]


def rows_of(num_rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(num_rows, width, device="cuda", generator=generator).to(dtype)


def inputs(num_rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, what is added, and weights away from 0."""
    hidden, addend = 3 * rows_of(num_rows, width, dtype), rows_of(num_rows, width, dtype, seed=1)
    return hidden, addend, 1 + rows_of(1, width, dtype, seed=2)[0] / 8


def poison_what_is_free(num_rows: int, width: int, dtype: torch.dtype) -> None:
    """The next tensors of this size begin as NaN."""
    freed = [torch.full((num_rows, width), float("nan"), dtype=dtype, device="cuda") for _ in "ab"]
    del freed


@pytest.mark.parametrize(("num_rows", "width"), SIZES)
def test_the_sum_is_torchs_and_the_norm_is_rounded_once(
    road: Road, num_rows: int, width: int
) -> None:
    hidden, addend, weight = inputs(num_rows, width, road.dtype)
    poison_what_is_free(num_rows, width, road.dtype)

    total, normed = add_norm(hidden, addend, weight, EPSILON)

    assert torch.equal(total, hidden + addend)
    exact = reference.rms_norm(total.double(), weight.double(), EPSILON)
    # Float32's own roundings are under 1 % of it; what is subnormal in fp16 rounds to steps.
    room = 1.01 * ROUNDING[road.dtype] * exact.abs() + 2.0**-25
    assert ((normed.double() - exact).abs() <= room).all()


@pytest.mark.parametrize("width", [40, 4096, 8200])
def test_a_row_has_the_same_bits_in_any_company(road: Road, width: int) -> None:
    hidden, addend, weight = inputs(333, width, road.dtype)
    together = add_norm(hidden, addend, weight, EPSILON)

    for begin, end in ((0, 1), (5, 6), (7, 40), (200, 333)):
        part = slice(begin, end)
        alone = add_norm(hidden[part].clone(), addend[part].clone(), weight, EPSILON)
        for mine, wanted in zip(alone, together, strict=True):
            assert torch.equal(mine, wanted[part])


def test_what_is_not_finite_stays_in_its_row(road: Road) -> None:
    hidden, addend, weight = inputs(5, 64, road.dtype)
    hidden[1, 3], hidden[3, 0], hidden[4] = float("inf"), float("nan"), -addend[4]

    total, normed = add_norm(hidden, addend, weight, EPSILON)

    assert normed[[0, 2]].isfinite().all()
    assert normed[3].isnan().all()
    assert not normed[1].isfinite().all()
    assert not total[4].any()
    assert not normed[4].any()  # 0 / sqrt(epsilon)


def test_no_rows(road: Road) -> None:
    hidden, addend, weight = inputs(0, 64, road.dtype)

    total, normed = add_norm(hidden, addend, weight, EPSILON)

    assert total.shape == normed.shape == (0, 64)


def test_a_graph_replays_with_other_rows(road: Road) -> None:
    hidden, addend, weight = inputs(7, 4096, road.dtype)
    add_norm(hidden, addend, weight, EPSILON)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = add_norm(hidden, addend, weight, EPSILON)
        second = add_norm(*first, weight, EPSILON)  # begins while the first one ends

    for seed in (5, 6):
        hidden.copy_(rows_of(7, 4096, road.dtype, seed=seed))
        for tensor in (*first, *second):
            tensor.fill_(float("nan"))
        graph.replay()
        wanted = add_norm(hidden, addend, weight, EPSILON)
        for mine, other in zip(first, wanted, strict=True):
            assert torch.equal(mine, other)
        for mine, other in zip(second, add_norm(*wanted, weight, EPSILON), strict=True):
            assert torch.equal(mine, other)
