"""The split of all ranks' pairs over the copies of their experts, on the GPU, by liblight_ops."""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.kernels.checks import require_cuda, require_dtype, require_shape
from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.library import address, library
from lightmoe.kernels.route_reference import NUM_SWEEPS, RouteSplit
from lightmoe.kernels.sort_pairs import MAX_EXPERTS, TOKENS_PER_TILE

MAX_RANKS = 64
MAX_LEVELS = 3
"""Levels of nearness."""

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
    num_ranks, num_experts = source_offsets.shape[0], source_offsets.shape[1] - 1
    require_shape(_STEM, "copy_ranks", copy_ranks, num_experts, None)
    require_shape(_STEM, "slots", slots, num_experts)
    tensors = {"source_offsets": source_offsets, "copy_ranks": copy_ranks, "slots": slots}
    if nearness is not None:
        tensors["nearness"] = nearness
        require_shape(_STEM, "nearness", nearness, None, num_ranks)
        _check_levels(nearness)
    for name, tensor in tensors.items():
        require_dtype(_STEM, name, tensor, torch.int32)
    _check_sizes(num_ranks, num_experts, copy_ranks.shape[1], rank, max_pairs)
    _check_choices(route, sweeps, tokens_per_tile)
    if source_offsets.stride(1) != 1 or not copy_ranks.is_contiguous():
        raise UsageError(f"{_STEM}: rows of source_offsets or copy_ranks have gaps; give a copy")
    require_cuda(_STEM, **tensors)
    num_copies = copy_ranks.shape[1]
    # One where there are no pairs: memory of no size has no address.
    most_tiles = max(1, max_pairs // tokens_per_tile + min(num_experts, max_pairs))
    sizes = [2 * num_ranks * num_experts * num_copies, num_experts + 1, num_experts + 1]
    sizes += [most_tiles, num_ranks]
    memory = torch.empty(sum(sizes), dtype=torch.int32, device=source_offsets.device)
    made = memory.split(sizes)
    library().launch(
        _STEM,
        source_offsets.device,
        tables=tuple(map(address, (source_offsets, copy_ranks, *made, None, nearness))),
        source_stride=source_offsets.stride(0),
        num_ranks=num_ranks,
        num_experts=num_experts,
        num_copies=num_copies,
        rank=rank,
        route=ROUTE_NUMBERS[route],
        sweeps=sweeps,
        tokens_per_tile=tokens_per_tile,
        most_tiles=most_tiles,
        num_levels=0 if nearness is None else len(nearness),
    )
    segments, offsets, tile_offsets, tile_groups, rank_pairs = made
    return RouteSplit(
        segments.view(num_ranks, num_experts, num_copies, 2),
        PairGroups(slots, offsets, tile_offsets, tile_groups, tokens_per_tile, max_pairs),
        rank_pairs,
    )


def _check_sizes(
    num_ranks: int, num_experts: int, num_copies: int, rank: int, max_pairs: int
) -> None:
    if not 1 <= num_ranks <= MAX_RANKS or not 0 <= rank < num_ranks:
        raise UsageError(f"{_STEM}: rank {rank} of {num_ranks}; it takes 1 to {MAX_RANKS} ranks")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise UsageError(f"{_STEM}: {num_experts} experts; it takes 1 to {MAX_EXPERTS}")
    if not 1 <= num_copies <= num_ranks:
        raise UsageError(f"{_STEM}: {num_copies} copies on {num_ranks} ranks; it takes one a rank")
    if not 0 <= max_pairs < _MAX_PAIRS:
        raise UsageError(f"{_STEM}: max_pairs {max_pairs}; it takes fewer than {_MAX_PAIRS}")


def _check_levels(nearness: Tensor) -> None:
    if not 1 <= len(nearness) <= MAX_LEVELS or not nearness.is_contiguous():
        raise UsageError(
            f"{_STEM}: nearness of {len(nearness)} levels; it takes 1 to {MAX_LEVELS} in one piece,"
            " or None"
        )


def _check_choices(route: str, sweeps: int, tokens_per_tile: int) -> None:
    if route not in ROUTE_NUMBERS:
        raise UsageError(f"{_STEM}: route {route!r} is unknown; give one of {list(ROUTE_NUMBERS)}")
    if sweeps < 0:
        raise UsageError(f"{_STEM}: sweeps {sweeps}; it takes 0 or more")
    if tokens_per_tile not in TOKENS_PER_TILE:
        raise UsageError(
            f"{_STEM}: tokens_per_tile {tokens_per_tile}; it takes multiples of"
            f" {TOKENS_PER_TILE.step} up to {TOKENS_PER_TILE[-1]}"
        )
