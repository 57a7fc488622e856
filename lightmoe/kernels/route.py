"""The split of all ranks' pairs over the copies of their experts, on the GPU, by liblight_ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    num_ranks, num_experts = source_offsets.shape[1], source_offsets.shape[2] - 1
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
    _check_sizes(num_ranks, num_experts, num_copies, rank, len(chunks))
    for route, tokens_per_tile, max_pairs in chunks:
        _check_choices(route, sweeps, tokens_per_tile, max_pairs)
    if source_offsets.stride(2) != 1 or not copy_ranks.is_contiguous():
        raise UsageError(f"{_STEM}: rows of source_offsets or copy_ranks have gaps; give a copy")
    require_cuda(_STEM, **tensors)
    made = _room_for(chunks, source_offsets, num_copies)
    first, step = address(source_offsets), 4 * source_offsets.stride(0)
    library().launch(
        _STEM,
        source_offsets.device,
        chunks=[
            (
                first + step * number,
                *tables.addresses,
                ROUTE_NUMBERS[route],
                tokens,
                tables.most_tiles,
            )
            for number, (tables, (route, tokens, _)) in enumerate(zip(made, chunks, strict=True))
        ],
        copy_ranks=address(copy_ranks),
        nearness=address(nearness),
        source_stride=source_offsets.stride(1),
        num_ranks=num_ranks,
        num_experts=num_experts,
        num_copies=num_copies,
        rank=rank,
        sweeps=sweeps,
        num_levels=0 if nearness is None else len(nearness),
    )
    return [
        RouteSplit(
            tables.segments.view(num_ranks, num_experts, num_copies, 2),
            PairGroups(
                slots, tables.offsets, tables.tile_offsets, tables.tile_groups, tokens, max_pairs
            ),
            tables.rank_pairs,
        )
        for tables, (_, tokens, max_pairs) in zip(made, chunks, strict=True)
    ]


class _Tables(NamedTuple):
    """What is written of a chunk, in the order of the binding."""

    segments: Tensor
    offsets: Tensor
    tile_offsets: Tensor
    tile_groups: Tensor
    rank_pairs: Tensor

    @property
    def addresses(self) -> tuple[int, ...]:
        return tuple(map(address, self))

    @property
    def most_tiles(self) -> int:
        return len(self.tile_groups)


def _room_for(
    chunks: Sequence[ChunkToSplit], source_offsets: Tensor, num_copies: int
) -> list[_Tables]:
    num_ranks, num_experts = source_offsets.shape[1], source_offsets.shape[2] - 1
    # In front, where their pairs of integers are aligned.
    sizes = [2 * num_ranks * num_experts * num_copies] * len(chunks)
    for _, tokens_per_tile, max_pairs in chunks:
        # One where there are no pairs: memory of no size has no address.
        most_tiles = max(1, max_pairs // tokens_per_tile + min(num_experts, max_pairs))
        sizes += [num_experts + 1, num_experts + 1, most_tiles, num_ranks]
    memory = torch.empty(sum(sizes), dtype=torch.int32, device=source_offsets.device).split(sizes)
    segments, others = memory[: len(chunks)], iter(memory[len(chunks) :])
    return [_Tables(*tables) for tables in zip(segments, *[others] * 4, strict=True)]


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


def _check_choices(route: str, sweeps: int, tokens_per_tile: int, max_pairs: int) -> None:
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
