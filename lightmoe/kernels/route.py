"""The split of all ranks' pairs over the copies of their experts, on the GPU, by liblight_ops."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.kernels.checks import require_cuda, require_dtype, require_shape
from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.library import address, library
from lightmoe.kernels.route_reference import NUM_SWEEPS, ChunkToSplit, RouteSplit
from lightmoe.kernels.sort_pairs import MAX_EXPERTS, TOKENS_PER_TILE

MAX_RANKS = 64
MAX_LEVELS = 3
"""Levels of nearness."""
MAX_CHUNKS = 8
"""LIGHT_MAX_CHUNKS of light_ops.h."""

ROUTE_NUMBERS = {"none": 0, "even": 1, "waterfill": 2, "fewest": 3}
"""The routes, and their numbers in light_ops.h."""

_MAX_PAIRS = 2**26
_STEM = "route_split"


def route_split(
    source_offsets: Tensor,
    copy_ranks: Tensor,
    slots: Tensor,
    tokens_per_tile: int,
    max_pairs: int,
    *,
    route: str,
    rank: int,
    sweeps: int = NUM_SWEEPS,
    nearness: Tensor | None = None,
) -> RouteSplit:
    """Split all ranks' pairs over the copies of their experts: reference's, on the GPU.

    `source_offsets` int32 [W, E + 1] may be rows of a longer table. All ranks together have fewer
    than 2^26 pairs; `nearness` int32 [N, W] has at most MAX_LEVELS levels. UsageError names the
    tensor that does not fit.
    """
    require_shape(_STEM, "source_offsets", source_offsets, None, None)
    (split,) = route_chunks(
        source_offsets.unsqueeze(0),
        copy_ranks,
        slots,
        [(route, tokens_per_tile, max_pairs)],
        rank=rank,
        sweeps=sweeps,
        nearness=nearness,
    )
    return split


def route_chunks(
    source_offsets: Tensor,
    copy_ranks: Tensor,
    slots: Tensor,
    chunks: Sequence[ChunkToSplit],
    *,
    rank: int,
    sweeps: int = NUM_SWEEPS,
    nearness: Tensor | None = None,
) -> list[RouteSplit]:
    """route_split of each chunk, in one launch: source_offsets int32 [C, W, E + 1]."""
    require_shape(_STEM, "source_offsets", source_offsets, len(chunks), None, None)
    _, num_ranks, num_offsets = source_offsets.shape
    num_experts = num_offsets - 1
    require_shape(_STEM, "copy_ranks", copy_ranks, num_experts, None)
    require_shape(_STEM, "slots", slots, num_experts)
    tensors = {"source_offsets": source_offsets, "copy_ranks": copy_ranks, "slots": slots}
    if nearness is not None:
        tensors["nearness"] = nearness
        require_shape(_STEM, "nearness", nearness, None, num_ranks)
        _check_levels(nearness)
    for name, tensor in tensors.items():
        require_dtype(_STEM, name, tensor, torch.int32)
    num_copies = copy_ranks.shape[1]
    plan = _plan(num_ranks, num_experts, num_copies, rank, sweeps, tuple(chunks))
    chunk_stride, source_stride, stride = source_offsets.stride()
    if stride != 1 or not copy_ranks.is_contiguous():
        raise UsageError(f"{_STEM}: rows of source_offsets or copy_ranks have gaps; give a copy")
    require_cuda(_STEM, **tensors)
    memory = torch.empty(plan.num_integers, dtype=torch.int32, device=source_offsets.device)
    first, begin = address(source_offsets), address(memory)
    library().launch(
        _STEM,
        source_offsets.device,
        chunks=[
            (first + 4 * chunk_stride * number, *[begin + table for table in tables], *how)
            for number, (tables, how) in enumerate(plan.chunks)
        ],
        copy_ranks=address(copy_ranks),
        nearness=address(nearness),
        source_stride=source_stride,
        num_ranks=num_ranks,
        num_experts=num_experts,
        num_copies=num_copies,
        rank=rank,
        sweeps=sweeps,
        num_levels=0 if nearness is None else len(nearness),
    )
    made = torch.split_with_sizes(memory, plan.sizes)
    all_segments, others = made[: len(chunks)], iter(made[len(chunks) :])
    return [
        RouteSplit(
            segments.view(plan.segments_shape),
            PairGroups(slots, offsets, tile_offsets, tile_groups, tokens, max_pairs),
            rank_pairs,
        )
        for segments, offsets, tile_offsets, tile_groups, rank_pairs, (_, tokens, max_pairs) in zip(
            all_segments, others, others, others, others, chunks, strict=True
        )
    ]


@dataclass(frozen=True)
class _Plan:
    """What is written, one table of integers behind the other, and how each chunk is split.

    First each chunk's segments [*segments_shape], then of each its offsets, tile_offsets,
    tile_groups and rank_pairs. `chunks`: where the five begin, in bytes, then the number of the
    route, the tokens of a tile and the most tiles.
    """

    segments_shape: tuple[int, ...]
    sizes: list[int]
    num_integers: int
    chunks: list[tuple[tuple[int, ...], tuple[int, int, int]]]


@functools.lru_cache(maxsize=1024)  # the layers of a step ask for the same
def _plan(
    num_ranks: int,
    num_experts: int,
    num_copies: int,
    rank: int,
    sweeps: int,
    chunks: tuple[ChunkToSplit, ...],
) -> _Plan:
    """UsageError names what the kernel does not take."""
    _check_sizes(num_ranks, num_experts, num_copies, rank, len(chunks))
    for chunk in chunks:
        _check_choices(sweeps, *chunk)
    shape = (num_ranks, num_experts, num_copies, 2)
    # In front, where their pairs of integers are aligned.
    sizes = [math.prod(shape)] * len(chunks)
    how = []
    for route, tokens_per_tile, max_pairs in chunks:
        # One where there are no pairs: memory of no size has no address.
        most_tiles = max(1, max_pairs // tokens_per_tile + min(num_experts, max_pairs))
        sizes += [num_experts + 1, num_experts + 1, most_tiles, num_ranks]
        how.append((ROUTE_NUMBERS[route], tokens_per_tile, most_tiles))
    *begins, num_bytes = (4 * size for size in itertools.accumulate(sizes, initial=0))
    segments, others = begins[: len(chunks)], iter(begins[len(chunks) :])
    tables = zip(segments, others, others, others, others, strict=True)
    return _Plan(shape, sizes, num_bytes // 4, list(zip(tables, how, strict=True)))


def _check_sizes(
    num_ranks: int, num_experts: int, num_copies: int, rank: int, num_chunks: int
) -> None:
    if not 1 <= num_ranks <= MAX_RANKS or not 0 <= rank < num_ranks:
        raise UsageError(f"{_STEM}: rank {rank} of {num_ranks}; it takes 1 to {MAX_RANKS} ranks")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise UsageError(f"{_STEM}: {num_experts} experts; it takes 1 to {MAX_EXPERTS}")
    if not 1 <= num_copies <= num_ranks:
        raise UsageError(f"{_STEM}: {num_copies} copies on {num_ranks} ranks; it takes one a rank")
    if not 1 <= num_chunks <= MAX_CHUNKS:
        raise UsageError(f"{_STEM}: {num_chunks} chunks; it takes 1 to {MAX_CHUNKS}")


def _check_levels(nearness: Tensor) -> None:
    if not 1 <= len(nearness) <= MAX_LEVELS or not nearness.is_contiguous():
        raise UsageError(
            f"{_STEM}: nearness of {len(nearness)} levels; it takes 1 to {MAX_LEVELS} in one piece,"
            " or None"
        )


def _check_choices(sweeps: int, route: str, tokens_per_tile: int, max_pairs: int) -> None:
    if route not in ROUTE_NUMBERS:
        raise UsageError(f"{_STEM}: route {route!r} is unknown; give one of {list(ROUTE_NUMBERS)}")
    if sweeps < 0:
        raise UsageError(f"{_STEM}: sweeps {sweeps}; it takes 0 or more")
    if tokens_per_tile not in TOKENS_PER_TILE:
        raise UsageError(
            f"{_STEM}: tokens_per_tile {tokens_per_tile}; it takes multiples of"
            f" {TOKENS_PER_TILE.step} up to {TOKENS_PER_TILE[-1]}"
        )
    if not 0 <= max_pairs < _MAX_PAIRS:
        raise UsageError(f"{_STEM}: max_pairs {max_pairs}; it takes fewer than {_MAX_PAIRS}")
