"""What a lane knows of a step and of each chunk of it: for all layers, and for one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightmoe.kernels.exchange import Chunk
from lightmoe.kernels.route_reference import ChunkToSplit
from lightmoe.moe.dispatch.base import Receipt, TokensPerTile
from lightmoe.moe.route import route_for


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkOfStep:
    """One chunk of a step, as all its layers have it.

    | field | meaning |
    |---|---|
    | number | which one |
    | begins, counts [W] | each rank's tokens |
    | tokens | this rank's, with what pads them |
    | num_pairs | of all ranks: so many rows [P, D] may come |
    | expected_pairs | of this rank, if all have alike |
    | prefixes, own_prefixes | where all ranks share theirs [W, E + 1]; the address of this rank's |
    | rows, pairs, pair_weight, output_rows | what the lane has for each pair; None: it has not |
    | dispatch_ctas, combine_ctas | thread blocks; 0 where the exchange has the device to itself |
    """

    number: int
    begins: list[int]
    counts: list[int]
    tokens: slice
    num_pairs: int
    expected_pairs: int
    prefixes: Tensor
    own_prefixes: int
    rows: Tensor
    pairs: Tensor | None
    pair_weight: Tensor | None
    output_rows: Tensor | None
    dispatch_ctas: int
    combine_ctas: int


Sizes = tuple[int, int]
"""Pairs and groups to plan for."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step's chunks, and what its layers find out of them once."""

    chunks: Sequence[ChunkOfStep]
    prefixes: Tensor
    """Of all chunks, [C, W, E + 1]."""
    _splits: dict[object, tuple[list[ChunkToSplit], list[Sizes]]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def tokens(self) -> list[slice]:
        """This rank's, of each chunk."""
        return [chunk.tokens for chunk in self.chunks]

    def to_split(
        self, route: str, num_held: int, tokens_per_tile: TokensPerTile
    ) -> tuple[list[ChunkToSplit], list[Sizes]]:
        """What the route takes of each chunk, and its sizes, where a rank has so many experts."""
        key = (route, num_held, tokens_per_tile)
        if key not in self._splits:
            num_experts = self.prefixes.shape[2] - 1
            sizes = [(chunk.expected_pairs, max(1, num_held)) for chunk in self.chunks]
            pairs = [chunk.num_pairs for chunk in self.chunks]
            self._splits[key] = (
                [
                    (route_for(route, most, num_experts), tokens_per_tile(*expected), most)
                    for most, expected in zip(pairs, sizes, strict=True)
                ],
                sizes,
            )
        return self._splits[key]


@dataclass(slots=True, kw_only=True)
class PeerReceipt(Receipt):
    """A chunk of the step, and where its pairs go in one layer."""

    chunk: Chunk
    step: ChunkOfStep
