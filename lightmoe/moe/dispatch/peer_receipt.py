"""What a lane knows of one chunk of a step: for all layers, and for one of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightmoe.kernels.exchange import Chunk
from lightmoe.moe.dispatch.base import Receipt


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


@dataclass(slots=True, kw_only=True)
class PeerReceipt(Receipt):
    """A chunk of the step, and where its pairs go in one layer."""

    chunk: Chunk
    step: ChunkOfStep
