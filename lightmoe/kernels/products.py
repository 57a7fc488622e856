"""What the matrix products share: the plan of a launch, its scratch memory, groups as addresses.

A plan depends on sizes alone, so it is made once for each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.kernels.checks import (
    require_dtype,
    require_half,
    require_multiple,
    require_rows,
    require_shape,
)
from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.library import address, library
from lightmoe.kernels.streams import raw_stream
from lightmoe.kernels.tiles import (
    Product,
    Tile,
    choose_depth_splits,
    choose_stages,
    choose_tile,
    permutes_rows,
)
from lightmoe.kernels.workspace import workspace_of

GroupFields = tuple[int, int, int, int, int, int]
"""light_pair_groups: the addresses of its four tables, G and P."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A tile, and how many CTAs share the depth of one; more than one needs tickets and sums.

    With `permutes` rows that are gathered by an index are permuted first.
    """

    tile: Tile
    tile_fields: tuple[int, ...]
    depth_splits: int = 1
    num_tickets: int = 0
    sums_bytes: int = 0
    permutes: bool = False


def plan_product(
    device: torch.device,
    dtype: torch.dtype,
    num_pairs: int,
    num_groups: int,
    num_features: int,
    depth: int,
    *,
    swiglu: bool,
    deterministic: bool,
    num_bits: int = 16,
    tokens_per_tile: int | None = None,
    expected: tuple[int, int] | None = None,
    row_bits: int = 16,
) -> Plan:
    """The plan on a CUDA device; `num_features` counts columns of the output.

    `tokens_per_tile` is given where the pairs are sorted already; UsageError if no tile has it.
    `expected` pairs and groups choose the tile where num_pairs and num_groups are only bounds.
    """
    return _plan(
        library().architecture_of(device),
        num_pairs,
        num_groups,
        num_features,
        depth,
        swiglu,
        dtype == torch.float16,
        deterministic,
        num_bits,
        tokens_per_tile,
        expected,
        row_bits,
    )


@functools.lru_cache(maxsize=1 << 14)
def _plan(
    architecture: str,
    num_pairs: int,
    num_groups: int,
    num_features: int,
    depth: int,
    swiglu: bool,
    half: bool,
    deterministic: bool,
    num_bits: int,
    tokens_per_tile: int | None,
    expected: tuple[int, int] | None,
    row_bits: int,
) -> Plan:
    product = Product(
        int(architecture.removesuffix("ptx")),
        *(expected or (num_pairs, num_groups)),
        num_features,
        depth,
        swiglu,
        half,
        deterministic,
        num_bits,
        tokens_per_tile,
        row_bits,
    )
    try:
        tile = choose_tile(product)
    except ValueError as error:
        raise UsageError(str(error)) from None
    tile = replace(tile, stages=choose_stages(product, tile))
    depth_splits = choose_depth_splits(product, tile)
    if depth_splits == 1:
        return Plan(tile, tile.fields, permutes=permutes_rows(product, tile))
    needs = library().split_needs(
        tile.fields, num_pairs, num_groups, product.weight_rows, depth_splits
    )
    return Plan(tile, tile.fields, depth_splits, *needs)


def split_scratch(plan: Plan, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Sums and tickets of a launch that is split; keep them until it is enqueued."""
    if plan.depth_splits == 1:
        return None, None
    sums = torch.empty(plan.sums_bytes, dtype=torch.uint8, device=device)
    return sums, _tickets(plan.num_tickets, device)


def make_room_on_stream(device: torch.device) -> None:
    """What kernels keep for a stream, for the current one: before a graph's capture on it."""
    workspace_of(device)
    unit_ticket(device)


def unit_ticket(device: torch.device) -> Tensor:
    """The ticket of which CTAs claim tiles; keep it until the launch is enqueued."""
    return _tickets(1, device)


_tickets_of_stream: dict[tuple[int, int], list[Tensor]] = {}


def _tickets(count: int, device: torch.device) -> Tensor:
    """Zeros that launches of one stream share: each leaves them zero for the next.

    A graph keeps the addresses it was captured with, so none is freed when larger ones are needed.
    In a capture only memory that exists is shared: what is made there, that graph alone zeroes.
    """
    key = (device.index, raw_stream(device))
    tables = _tickets_of_stream.get(key)
    if tables is not None and tables[-1].shape[0] >= count:
        return tables[-1]
    zeros = torch.zeros(2 * count, dtype=torch.int32, device=device)
    if not torch.cuda.is_current_stream_capturing():
        _tickets_of_stream.setdefault(key, []).append(zeros)
    return zeros


def group_fields(groups: PairGroups) -> GroupFields:
    """The tables of groups on a GPU as light_pair_groups."""
    return (
        groups.slots.data_ptr(),
        groups.offsets.data_ptr(),
        address(groups.tile_offsets),
        address(groups.tile_groups),
        groups.slots.shape[0],
        groups.num_pairs,
    )


def check_pairs(
    stem: str,
    rows: Tensor,
    groups: PairGroups,
    row_index: Tensor | None,
    pair_weight: Tensor | None,
) -> None:
    """UsageError unless rows [R, D], groups, row_index [P] and pair_weight [P] fit each other."""
    require_half(stem, "rows", rows)
    check_order(stem, rows, groups, row_index, pair_weight)


def check_order(
    stem: str,
    rows: Tensor,
    groups: PairGroups,
    row_index: Tensor | None,
    pair_weight: Tensor | None,
) -> None:
    """check_pairs of rows of any dtype."""
    check_rows(stem, rows, groups.num_pairs if row_index is None else None)
    check_groups(stem, groups, row_index, pair_weight)


def check_rows(stem: str, rows: Tensor, num_rows: int | None) -> None:
    """UsageError unless the kernels take rows [R, D] of this form; `num_rows` None: any number."""
    require_multiple(stem, "rows", rows, 1, 16 // rows.element_size())
    require_rows(stem, "rows", rows)
    require_shape(stem, "rows", rows, num_rows, None)


def check_groups(
    stem: str, groups: PairGroups, row_index: Tensor | None, pair_weight: Tensor | None
) -> None:
    """UsageError unless groups have tiles, and row_index [P] and pair_weight [P] fit them."""
    if row_index is not None:
        require_shape(stem, "row_index", row_index, groups.num_pairs)
        require_dtype(stem, "row_index", row_index, torch.int32)
    if pair_weight is not None:
        require_shape(stem, "pair_weight", pair_weight, groups.num_pairs)
        require_dtype(stem, "pair_weight", pair_weight, torch.float32)
    if groups.tile_offsets is None or groups.tile_groups is None:
        raise UsageError(f"{stem}: groups has no tile table; sort the pairs on the GPU")
