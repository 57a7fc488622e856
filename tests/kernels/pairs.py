"""What the tests of the matrix kernels share: random pairs on the GPU, their products in float64,
and the roads: the kernels of the card itself, and the PTX of Turing and of Ampere, which newer
cards run too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightmoe.kernels import PairGroups, products
from lightmoe.kernels.library import FOLDER, library, read_manifest, using
from lightmoe.kernels.reference import sort_pairs
from lightmoe.kernels.tiles import Tile, candidates
from tests.gpus import half_dtypes

DELAY_CYCLES = 2_000_000  # about a millisecond: everything behind it is enqueued by then
MOST_ERROR = {torch.bfloat16: 4e-3, torch.float16: 1e-3}  # of the norm of a whole output
TURING, AMPERE = "75ptx", "80ptx"
# Pairs of groups: none, one, and both sides of what each width of mma and each tile holds.
_EDGES = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 352)
COUNTS = [0, 1, 0, *(edge + over for edge in _EDGES for over in (-1, 0, 1)), 0]


@dataclass(frozen=True)
class Road:
    """Kernels and a dtype that they take; no architecture: the card's own."""

    dtype: torch.dtype
    architecture: str | None = None

    def __str__(self) -> str:
        """How pytest names it."""
        return f"{self.architecture or 'native'}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def most_error(self) -> float:
        """The relative error that a product may have."""
        return MOST_ERROR[self.dtype]


NATIVE = [Road(getattr(torch, name)) for name in half_dtypes()]
ROADS = [*NATIVE, Road(torch.float16, TURING), Road(torch.bfloat16, AMPERE)]
SPLITTING = [*NATIVE, Road(torch.bfloat16, AMPERE)]


@contextlib.contextmanager
def on_road(road: Road) -> Iterator[Road]:
    """Launches inside use the road's kernels; skips the test where they were not built."""
    manifest = read_manifest(FOLDER)
    if road.architecture and (manifest is None or road.architecture not in manifest.kernels):
        remedy = f"build.py --arch 90,{road.architecture}"
        pytest.skip(f"no kernels for {road.architecture} in {FOLDER}: {remedy}")
    with using(architecture=road.architecture):
        yield road


def architecture() -> int:
    """The architecture whose kernels launches use now: 75, 90."""
    name = library().architecture_of(torch.device("cuda", torch.cuda.current_device()))
    return int(name.removesuffix("ptx"))


def tiles_of(dtype: torch.dtype, num_bits: int, row_bits: int = 16) -> list[Tile]:
    """Every tile that launches of this dtype may use now."""
    return [
        tile
        for tile in candidates(architecture(), num_bits, row_bits)
        if dtype == torch.float16 or not tile.half_accumulate
    ]


def has_split_tiles() -> bool:
    """Whether CTAs may share the depth of an output now: not on warpgroups."""
    return not candidates(architecture(), 16)[0].limit


def split_tiles_of(dtype: torch.dtype, num_bits: int) -> list[Tile]:
    """Those of tiles_of whose depth CTAs may share; skips the test where there are none."""
    if not has_split_tiles():
        pytest.skip("tiles of warpgroups share no depth among CTAs")
    return tiles_of(dtype, num_bits)


def order_never_varies(tile: Tile) -> bool:
    """Whether a sum of this tile is one chain in fp32, the same as in any other such tile."""
    return not tile.half_accumulate and tile.depth_parts == 1


@contextlib.contextmanager
def gathered_rows() -> Iterator[None]:
    """Products inside gather rows in the kernel, also where they would permute them first."""
    products._plan.cache_clear()
    try:
        with mock.patch.object(products, "permutes_rows", return_value=False):
            yield
    finally:
        products._plan.cache_clear()


def on_two_streams(enqueue: Callable[[], Tensor], rounds: int = 4) -> list[Tensor]:
    """What `enqueue` makes on two streams at once, behind a kernel that keeps each one waiting."""
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    made = []
    torch.cuda.synchronize()
    for _ in range(rounds):
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(DELAY_CYCLES)
                made.append(enqueue())
    torch.cuda.synchronize()
    return made


@contextlib.contextmanager
def only_tile(tile: Tile, depth_splits: int = 1) -> Iterator[None]:
    """Products inside use this tile, whatever their sizes, and cut their depth into such parts."""
    products._plan.cache_clear()
    try:
        with (
            mock.patch.object(products, "choose_tile", return_value=tile),
            mock.patch.object(products, "choose_depth_splits", return_value=depth_splits),
        ):
            yield
    finally:
        products._plan.cache_clear()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """What is allocated inside without a value is NaN, so what no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random_tensor(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).to(dtype)


def random_weights(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Normal numbers on the GPU, so small that products are as large as the rows."""
    return random_tensor(*shape, dtype=dtype, seed=seed).mul_(shape[-1] ** -0.5)


def random_experts(
    num_tokens: int, num_experts: int, num_experts_per_token: int, seed: int = 0
) -> Tensor:
    """Experts [T, K] that differ within a token, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    return scores.argsort(dim=1)[:, :num_experts_per_token].contiguous().cuda()


def random_slots(num_experts: int, num_slots: int, seed: int = 0) -> Tensor:
    """A slot of the pool for each expert, in no order: int32 [E] on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_slots, generator=generator)[:num_experts].int().cuda()


@dataclass(frozen=True)
class Pairs:
    """Sorted pairs on the GPU: their groups, the token of each [P], where each went [T, K]."""

    groups: PairGroups
    row_index: Tensor
    pair_index: Tensor


def sort_experts(
    experts: Tensor, slots: Tensor, tokens_per_tile: int, num_experts: int | None = None
) -> Pairs:
    """The pairs of experts [T, K] in tiles of `tokens_per_tile`."""
    return Pairs(*sort_pairs(experts, num_experts or len(slots), slots, tokens_per_tile))


def group_counts(counts: Sequence[int], slots: Tensor, tokens_per_tile: int) -> Pairs:
    """So many pairs of each group, each of a token of its own."""
    experts = torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    return sort_experts(experts[:, None].cuda(), slots, tokens_per_tile)


def expected_product(
    rows: Tensor,
    weights: Tensor,
    groups: PairGroups,
    row_index: Tensor | None = None,
    *,
    swiglu: bool = False,
    pair_weight: Tensor | None = None,
) -> Tensor:
    """The product in float64 [P, N or N / 2] of rows [R, D] and weights [S, N, D] as they are."""
    gathered = (rows if row_index is None else rows[row_index]).double()
    borders = groups.offsets.tolist()
    product = gathered.new_empty(groups.num_pairs, weights.shape[1])
    for group, slot in enumerate(groups.slots.tolist()):
        part = slice(borders[group], borders[group + 1])
        product[part] = gathered[part] @ weights[slot].double().t()
    if swiglu:
        gate, up = product.chunk(2, dim=1)
        product = torch.nn.functional.silu(gate) * up
    return product if pair_weight is None else product * pair_weight.double()[:, None]


def assert_close(actual: Tensor, expected: Tensor, most_error: float) -> None:
    """All finite, and the norm of the error a small part of the norm of what is expected."""
    assert actual.shape == expected.shape
    assert bool(actual.isfinite().all()), "not finite: computed wrong, or never written"
    size = expected.norm()
    assert size > 0, "zeros are close to anything"
    error = float((actual.double() - expected).norm() / size)
    assert error <= most_error, f"relative error {error:.2e}"


def assert_tickets_are_zero() -> None:
    """Split products of the current stream have left their tickets as they found them."""
    stream = torch.cuda.current_stream()
    tables = products._tickets_of_stream[stream.device_index, stream.cuda_stream]
    assert tables
    assert not any(table.any() for table in tables)
