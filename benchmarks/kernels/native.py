"""The matrix kernels with the tile said by the caller: the operators choose theirs themselves.

Launches go through lightmoe.kernels.library; what is built is read from its manifest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightmoe.kernels.library import Library, address
from lightmoe.kernels.products import Plan, split_scratch
from lightmoe.kernels.tiles import Tile, candidates
from lightmoe.quant.fragments import PackedMatrix

DTYPES = {torch.float16: 0, torch.bfloat16: 1}
DTYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Groups:
    """Pairs sorted by expert, and the tile table for one number of tokens per tile: int32 [...]."""

    offsets: Tensor
    tile_offsets: Tensor
    tile_groups: Tensor
    num_pairs: int

    @classmethod
    def from_counts(cls, counts: Tensor, tokens_per_tile: int) -> Groups:
        """From pairs per expert [E]."""
        zero = counts.new_zeros(1)
        num_tiles = (counts + tokens_per_tile - 1) // tokens_per_tile
        experts = torch.arange(len(counts), device=counts.device)
        return cls(
            torch.cat([zero, counts.cumsum(0)]).int(),
            torch.cat([zero, num_tiles.cumsum(0)]).int(),
            torch.repeat_interleave(experts, num_tiles).int(),
            int(counts.sum()),
        )

    @property
    def argument(self) -> tuple[int, ...]:
        """light_pair_groups as the binding takes it: group g is slot g."""
        tables = (self.offsets, self.tile_offsets, self.tile_groups)
        return 0, *map(address, tables), len(self.offsets) - 1, self.num_pairs


def built_tiles(
    folder: str,
    names: Iterable[str],
    stem: str,
    dtype: torch.dtype,
    *,
    swiglu: bool,
    num_bits: int = 16,
) -> list[Tile]:
    """The tiles of an architecture's folder whose instance is among the compiled kernels' names."""
    bits = "" if num_bits == 16 else f"_int{num_bits}"
    epilogue = "swiglu" if swiglu else "plain"
    built = set(names)
    return [
        tile
        for tile in candidates(int(folder.removesuffix("ptx")), num_bits)
        if f"{stem}_{DTYPE_NAMES[dtype]}{bits}_{tile.name}_{epilogue}" in built
    ]


@dataclass(frozen=True)
class Launch:
    """How to run a product: the tile, the CTAs that share its depth, and the most CTAs in all."""

    tile: Tile
    depth_splits: int = 1
    max_ctas: int = 0  # 0: as many as the card holds

    def __str__(self) -> str:
        tile, splits = self.tile, f"_k{self.depth_splits}" if self.depth_splits > 1 else ""
        return tile.name + (f"_t{tile.tokens}_s{tile.stages}" if tile.limit else "") + splits

    def scratch(
        self, library: Library, groups: Groups, weight_rows: int, rows: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Memory for partial sums and tickets, to be kept until the launch is enqueued."""
        sizes = (groups.num_pairs, len(groups.offsets) - 1, weight_rows, self.depth_splits)
        plan = Plan(self.tile, self.tile.fields)
        if self.depth_splits > 1:
            needs = library.split_needs(self.tile.fields, *sizes)
            plan = Plan(self.tile, self.tile.fields, self.depth_splits, *needs)
        return split_scratch(plan, rows.device)


def grouped_gemm(
    library: Library,
    launch: Launch,
    rows: Tensor,
    weights: Tensor,
    groups: Groups,
    pair_row: Tensor | None,
    output: Tensor,
    *,
    swiglu: bool,
) -> None:
    """output[p] = rows[pair_row[p]] @ weights[expert of p].T, SwiGLU of it where said."""
    sums, tickets = launch.scratch(library, groups, weights.shape[1], rows)
    library.launch(
        "grouped_gemm",
        rows.device,
        weights=address(weights),
        slot_bytes=weights[0].nbytes,
        depth=weights.shape[2],
        swiglu=swiglu,
        **_common(launch, rows, groups, pair_row, output),
        split_sums=address(sums),
        split_tickets=address(tickets),
        depth_splits=launch.depth_splits,
    )


def quant_gemm(
    library: Library,
    launch: Launch,
    rows: Tensor,
    weights: PackedMatrix,
    groups: Groups,
    pair_row: Tensor | None,
    output: Tensor,
) -> None:
    """The same from packed experts, whose codes and scales are views of one blob a slot."""
    weight_rows = weights.num_features * (2 if weights.swiglu else 1)
    sums, tickets = launch.scratch(library, groups, weight_rows, rows)
    library.launch(
        "quant_gemm",
        rows.device,
        weights=address(weights.packed),
        scales=address(weights.scales),
        zeros=address(weights.zeros),
        slot_bytes=weights.packed.stride(0),
        depth=weights.depth,
        swiglu=weights.swiglu,
        num_bits=weights.num_bits,
        group_size=weights.group_size,
        **_common(launch, rows, groups, pair_row, output),
        split_sums=address(sums),
        split_tickets=address(tickets),
        depth_splits=launch.depth_splits,
    )


def _common(
    launch: Launch, rows: Tensor, groups: Groups, pair_row: Tensor | None, output: Tensor
) -> dict[str, object]:
    return {
        "groups": groups.argument,
        "tile": launch.tile.fields,
        "dtype": DTYPES[rows.dtype],
        "rows": address(rows),
        "pair_row": address(pair_row),
        "pair_weight": 0,
        "output": address(output),
        "num_features": output.shape[1],
        "output_float32": False,
        "max_ctas": launch.max_ctas,
        "groups_settled": False,
    }
