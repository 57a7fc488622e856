"""Pairs sorted by expert with their table of tiles, by liblight_ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.kernels.checks import require_cuda, require_dtype, require_shape
from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.library import address, library
from lightmoe.kernels.workspace import workspace_of

MAX_EXPERTS = 512
MAX_EXPERTS_PER_TOKEN = 16
TOKENS_PER_TILE = range(8, 257, 8)
_ANY_TILE = 64
"""Pairs a tile where nobody asks for tiles."""

_STEM = "sort_pairs"


def sort_pairs(
    experts: Tensor,
    num_experts: int,
    slots: Tensor,
    tokens_per_tile: int,
    *,
    weights: Tensor | None = None,
    pair_weight: Tensor | None = None,
) -> tuple[PairGroups, Tensor, Tensor]:
    """Pairs of experts [T, K] by expert, then token: groups, pair_row int32 [P], pair_index [T, K].

    Experts are of int32, or of another integer type at the cost of a copy. `pair_weight` fp32 [P]
    is written from `weights` [T, K] where it is given.
    """
    _check_experts(experts, num_experts)
    if (weights is None) != (pair_weight is None):
        raise UsageError(f"{_STEM}: weights and pair_weight go together; give both or none")
    if weights is not None:
        require_shape(_STEM, "weights", weights, *experts.shape)
        require_dtype(_STEM, "weights", weights, torch.float32)
        weights = weights.contiguous()
    require_cuda(_STEM, experts=experts, slots=slots, weights=weights, pair_weight=pair_weight)
    experts = experts.to(torch.int32).contiguous()
    table = PairTable.empty(experts, num_experts, slots, tokens_per_tile)
    library().launch(
        _STEM,
        experts.device,
        experts=address(experts),
        weights=address(weights),
        sort=table.fields(num_experts, experts, pair_weight, None),
        max_ctas=0,
    )
    return table.groups, table.pair_row, table.pair_index


def sort_chunks(
    experts: Tensor, num_experts: int, chunks: Sequence[slice]
) -> tuple[Tensor, Tensor]:
    """Sort each chunk of experts [T, K] by itself: where its experts begin, where its pairs went.

    reference.sort_chunks', a launch a chunk. Experts are sort_pairs'.
    """
    _check_experts(experts, num_experts)
    require_cuda(_STEM, experts=experts)
    experts = experts.to(torch.int32).contiguous()
    num_tokens, per_token = experts.shape
    counts = [chunk.stop - chunk.start for chunk in chunks]
    assert sum(counts) == num_tokens, "chunks have all tokens"
    most_pairs = max(counts) * per_token
    most_tiles = most_pairs // _ANY_TILE + min(num_experts, most_pairs)
    indices = torch.empty_like(experts)
    num_offsets, device = num_experts + 1, experts.device
    offsets = torch.empty(len(chunks), num_offsets, dtype=torch.int32, device=device)
    # What nobody reads, rows and tiles, is the same for all chunks: their sorts do not overlap.
    sizes = (most_pairs, num_offsets, most_tiles)
    unread = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    rows, workspace = address(unread), workspace_of(device)
    tile_offsets = rows + 4 * most_pairs
    tile_groups = tile_offsets + 4 * num_offsets
    first_index, first_offset = address(indices), address(offsets)
    chosen = address(experts)
    kept = (address(workspace), workspace.numel())
    for number, (chunk, count) in enumerate(zip(chunks, counts, strict=True)):
        first = 4 * per_token * chunk.start
        library().launch(
            _STEM,
            device,
            experts=chosen + first,
            weights=0,
            sort=(
                rows,
                first_index + first,
                0,
                first_offset + 4 * number * num_offsets,
                0,
                tile_offsets,
                tile_groups,
                *kept,
                _ANY_TILE,
                count,
                num_experts,
                per_token,
            ),
            max_ctas=0,
        )
    return offsets, indices


def _check_experts(experts: Tensor, num_experts: int) -> None:
    require_shape(_STEM, "experts", experts, None, None)
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise UsageError(f"{_STEM}: {num_experts} experts; it takes 1 to {MAX_EXPERTS}")
    if not 1 <= experts.shape[1] <= MAX_EXPERTS_PER_TOKEN:
        raise UsageError(
            f"{_STEM}: experts has size {experts.shape[1]} in dimension 1; it takes 1 to"
            f" {MAX_EXPERTS_PER_TOKEN}"
        )


@dataclass(frozen=True)
class PairTable:
    """What a sort of pairs writes."""

    groups: PairGroups
    pair_row: Tensor
    pair_index: Tensor

    @classmethod
    def empty(
        cls, experts: Tensor, num_experts: int, slots: Tensor, tokens_per_tile: int
    ) -> PairTable:
        """Room for the pairs of experts [T, K] on their device."""
        require_shape(_STEM, "slots", slots, num_experts)
        require_dtype(_STEM, "slots", slots, torch.int32)
        if tokens_per_tile not in TOKENS_PER_TILE:
            raise UsageError(
                f"{_STEM}: tokens_per_tile {tokens_per_tile}; it takes multiples of"
                f" {TOKENS_PER_TILE.step} up to {TOKENS_PER_TILE[-1]}"
            )
        num_pairs = experts.numel()
        most_tiles = num_pairs // tokens_per_tile + min(num_experts, num_pairs)
        sizes = [num_pairs, num_pairs, num_experts + 1, num_experts + 1, most_tiles]
        memory = torch.empty(sum(sizes), dtype=torch.int32, device=experts.device)
        pair_row, pair_index, offsets, tile_offsets, tile_groups = memory.split(sizes)
        groups = PairGroups(slots, offsets, tile_offsets, tile_groups, tokens_per_tile, num_pairs)
        return cls(groups, pair_row, pair_index.view(experts.shape))

    def fields(
        self,
        num_experts: int,
        experts: Tensor,
        pair_weight: Tensor | None,
        expert_counts: Tensor | None,
    ) -> tuple[int, ...]:
        """light_pair_sort, but what the launcher fills in."""
        if pair_weight is not None:
            require_shape(_STEM, "pair_weight", pair_weight, self.groups.num_pairs)
            require_dtype(_STEM, "pair_weight", pair_weight, torch.float32)
        if expert_counts is not None:
            require_shape(_STEM, "expert_counts", expert_counts, num_experts)
            require_dtype(_STEM, "expert_counts", expert_counts, torch.int32)
        require_cuda(
            _STEM,
            experts=experts,
            slots=self.groups.slots,
            pair_weight=pair_weight,
            expert_counts=expert_counts,
        )
        workspace = workspace_of(experts.device)
        return (
            address(self.pair_row),
            address(self.pair_index),
            address(pair_weight),
            address(self.groups.offsets),
            address(expert_counts),
            address(self.groups.tile_offsets),
            address(self.groups.tile_groups),
            address(workspace),
            workspace.numel(),
            self.groups.tokens_per_tile,
            len(experts),
            num_experts,
            experts.shape[1],
        )
