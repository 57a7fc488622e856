"""What every transport shares: the seam, the receipt, and the ranks that take part.

Shapes: T tokens on this rank, D model width, K experts per token, R rows received, P pairs
computed here, L layers that have experts, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from lightmoe.distributed.communicator import Communicator
from lightmoe.kernels import PairGroups
from lightmoe.moe.gate import Choice, PairSort
from lightmoe.moe.placement import Placement

TokensPerTile = Callable[[int, int], int]
"""How many pairs a tile of the experts' products has, for P pairs in so many groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What experts and combine must know of one chunk of tokens.

    | field | meaning |
    |---|---|
    | tokens | the chunk: this rank's tokens, as a slice of 0 .. T |
    | pair_row [P] | row of each pair, pairs sorted by slot |
    | groups | which pairs are whose: one group a slot |
    | pair_index [T, K] | where each pair's result lies in what combine gets back |
    | pair_weight [P] | the routing weights, where the experts apply them and combine does not |
    | send_row [rows sent] | token of each row sent, by destination rank, then token |
    | rows_sent, rows_received [W] | rows to / from each rank |
    | return_order [P] | slot-sorted pair of each pair in the order results travel back |
    | pairs_returned, pairs_received [W] | results to / from each rank |

    A transport that moves nothing leaves send_row and what follows it empty; pair_weight is None
    where the answer must not depend on the placement.
    """

    tokens: slice
    pair_row: Tensor
    groups: PairGroups
    pair_index: Tensor
    pair_weight: Tensor | None = None
    send_row: Tensor | None = None
    rows_sent: Sequence[int] = ()
    rows_received: Sequence[int] = ()
    return_order: Tensor | None = None
    pairs_returned: Sequence[int] = ()
    pairs_received: Sequence[int] = ()


class Dispatcher(Protocol):
    """Rows out to the ranks that hold the experts, results back. One a layer.

    `pair_sort` is how the gate may sort the pairs where none of them travels, else None.
    """

    pair_sort: PairSort | None

    def route(self, choice: Choice, num_chunks: int) -> list[Receipt]:
        """One exchange of what all ranks chose, then where every pair of each chunk goes."""
        ...

    def dispatch(self, hidden: Tensor, receipt: Receipt) -> Tensor:
        """This chunk's rows, one per (token, rank): [T, D] -> [R, D]."""
        ...

    def combine(self, pairs: Tensor, weights: Tensor, receipt: Receipt) -> Tensor:
        """Results back to their tokens, weighted, summed: [P, D] -> [T of the chunk, D]."""
        ...


@dataclass(slots=True)
class ExpertGroup:
    """The ranks over which the experts are spread, as one rank sees them.

    `tokens_per_rank` is set by the runner before each step: the engine knows it, so no exchange is
    needed for it. `layer_pairs` [L] counts pairs computed here since it was last taken. Without
    `deterministic` the routing weights may be applied before the results travel.
    """

    rank: int
    placement: Placement
    communicator: Communicator | None
    route: str
    layer_pairs: np.ndarray
    tokens_per_rank: tuple[int, ...] = ()
    deterministic: bool = True


def chunk_of(num_tokens: int, chunk: int, num_chunks: int) -> slice:
    """Tokens of one of `num_chunks` nearly equal chunks."""
    return slice(num_tokens * chunk // num_chunks, num_tokens * (chunk + 1) // num_chunks)
