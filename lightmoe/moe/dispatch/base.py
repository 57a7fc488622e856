"""What every transport shares: the seam, the receipt, and the ranks that take part.

Shapes: T tokens on this rank, D model width, K experts per token, R rows received, P pairs
computed here, L layers that have experts, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from lightmoe.distributed.communicator import Communicator, Exchanger
from lightmoe.kernels import PairGroups
from lightmoe.moe.gate import Choice, PairSort
from lightmoe.moe.placement import Placement
from lightmoe.moe.residency import Residency
from lightmoe.moe.route import Nearness
from lightmoe.moe.tables import PlacementTables
from lightmoe.telemetry.trace import recording

if TYPE_CHECKING:
    from lightmoe.moe.dispatch.peer_lane import PeerLane

TokensPerTile = Callable[[int, int], int]
"""How many pairs a tile of the experts' products has, for P pairs in so many groups."""


# Not frozen, nor what is in it: each chunk of each layer makes one, and that takes thrice as long.
@dataclass(slots=True, kw_only=True)
class Receipt:
    """What experts and combine must know of one chunk of tokens.

    | field | meaning |
    |---|---|
    | tokens | the chunk: this rank's tokens, as a slice of 0 .. T |
    | groups | which pairs are whose: one group a slot |
    | pair_row [P] | row of each pair, pairs sorted by slot; None: row p is pair p |
    | pair_index [T, K] | where each pair's result lies in what combine gets back |
    | pair_weight [P] | the routing weights, where the experts apply them and combine does not |
    | output_rows [P] | addresses of the results where the experts can write them there, int64 |
    | expected | pairs and groups to plan for, where those of `groups` are only bounds |
    | send_row [rows sent] | token of each row sent, by destination rank, then token |
    | rows_sent, rows_received [W] | rows to / from each rank |
    | return_order [P] | slot-sorted pair of each pair in the order results travel back |
    | pairs_returned, pairs_received [W] | results to / from each rank |

    A transport that moves nothing leaves send_row and what follows it empty; pair_weight is None
    where the answer must not depend on the placement.
    """

    tokens: slice
    groups: PairGroups
    pair_row: Tensor | None = None
    pair_index: Tensor | None = None
    pair_weight: Tensor | None = None
    output_rows: Tensor | None = None
    expected: tuple[int, int] | None = None
    send_row: Tensor | None = None
    rows_sent: Sequence[int] = ()
    rows_received: Sequence[int] = ()
    return_order: Tensor | None = None
    pairs_returned: Sequence[int] = ()
    pairs_received: Sequence[int] = ()


class Dispatcher(Protocol):
    """Rows out to the ranks that hold the experts, results back. One a layer.

    `pair_sort` is how the gate may sort the pairs where none of them travels, else None. `stream`
    is where a GPU's exchange may run beside the experts, `beside` where their second product may
    run beside what comes next: where it waits for links. With `exchanges_at_once` dispatch and
    combine must not be under way at once, but as one `exchange`. `combines_here`: combine reads
    nothing but this rank's own card. `operations_per_byte` is what a card computes while a byte of
    results leaves it; 0 where the second product keeps them.
    """

    pair_sort: PairSort | None = None
    stream: torch.cuda.Stream | None = None
    beside: torch.cuda.Stream | None = None
    exchanges_at_once: bool = False
    combines_here: bool = False
    operations_per_byte: float = 0.0

    def most_tokens(self, hidden: Tensor) -> int:
        """Tokens of the fullest rank in this step, [T, D] being this one's."""
        return len(hidden)

    def publish(self, hidden: Tensor, num_chunks: int = 1) -> None:
        """These are the hidden states [T, D] of the next route, which is in so many chunks.

        They stay as they are until the results of all chunks are there.
        """
        return None  # noqa: RET501  (an empty body would be abstract)

    def counts_into(self, load: Tensor) -> bool:
        """Whether `route` adds the pairs of each expert to `load`, int32 [E], from now on."""
        return False

    def route(self, choice: Choice, num_chunks: int) -> Sequence[Receipt]:
        """One exchange of what all ranks chose, then where every pair of each chunk goes."""
        ...

    def dispatch(self, hidden: Tensor, receipt: Receipt) -> Tensor:
        """This chunk's rows, one per (token, rank): [T, D] -> [R, D]."""
        ...

    def output_of(self, receipt: Receipt) -> Tensor | None:
        """Where the experts write the chunk's results [P, D]; None: into memory of their own."""
        return None

    def combine(
        self, pairs: Tensor, weights: Tensor, receipt: Receipt, output: Tensor | None = None
    ) -> Tensor:
        """Results back to their tokens, weighted, summed: [P, D] -> [T of the chunk, D].

        `output` is written and returned where given.
        """
        ...

    def combine_all(
        self,
        pairs: Sequence[Tensor],
        weights: Tensor,
        receipts: Sequence[Receipt],
        outputs: Sequence[Tensor],
    ) -> None:
        """combine of chunks whose results have all been computed."""
        for given, receipt, output in zip(pairs, receipts, outputs, strict=True):
            self.combine(given, weights, receipt, output)

    def exchange(
        self, dispatch: tuple[Tensor, Receipt], combine: tuple[Tensor, Tensor, Receipt]
    ) -> tuple[Tensor, Tensor]:
        """dispatch(*dispatch) of one chunk, combine(*combine) of another, the same everywhere."""
        return self.dispatch(*dispatch), self.combine(*combine)


@dataclass(slots=True)
class ExpertGroup:
    """The ranks over which the experts are spread, as one rank sees them.

    `tokens_per_rank` is set by the runner before each step: the engine knows it, so no exchange is
    needed for it. `num_real` int32 [1] is how many of this rank's rows are tokens, where they are
    padded; None: all of them. `in_halves` while a step runs as two, on `peers` and `second_peers`.
    `communicator` is None for a rank alone; `nccl` is for what is on GPUs. `layer_pairs` [L]
    counts pairs computed here since it was last taken. Without `deterministic` the routing weights
    may be applied before the results travel. `bytes_sent` [W] is what this rank sent to each in a
    step that is traced, rows and results; None where no transport counts it. `residency` is there
    where experts take turns in the slots: the placement's slots are then rows of the host's copy.
    `nearness` [N, W] is the topology's, the same on every rank; empty where none is nearer.
    """

    rank: int
    placement: Placement
    communicator: Communicator | None
    route: str
    layer_pairs: np.ndarray
    tokens_per_rank: tuple[int, ...] = ()
    deterministic: bool = True
    num_real: Tensor | None = None
    nccl: Exchanger | None = None
    peers: PeerLane | None = None
    second_peers: PeerLane | None = None
    in_halves: bool = False
    bytes_sent: np.ndarray | None = None
    residency: Residency | None = None
    nearness: Nearness = ()
    _tables: PlacementTables | None = field(default=None, init=False, repr=False)

    @property
    def lanes(self) -> tuple[PeerLane, ...]:
        """This rank's ends of the arenas that it has joined."""
        return tuple(lane for lane in (self.peers, self.second_peers) if lane is not None)

    def count_sent(self, num_rows: Sequence[int], rows: Tensor) -> None:
        """While a trace is recorded: `num_rows` [W] of the rows [N, D] go to each rank."""
        if not recording():
            return
        sent = np.asarray(num_rows, dtype=np.int64) * (rows.shape[1] * rows.element_size())
        sent[self.rank] = 0  # what stays does not travel
        self.bytes_sent = sent if self.bytes_sent is None else self.bytes_sent + sent

    def take_bytes_sent(self) -> tuple[int, ...]:
        """`bytes_sent`, and what lanes counted, since last asked; empty where nothing was."""
        counts = [self.bytes_sent, *(lane.take_bytes_sent() for lane in self.lanes)]
        self.bytes_sent = None
        known = [sent for sent in counts if sent is not None]
        return tuple(np.sum(known, axis=0).tolist()) if known else ()

    def tables_on(self, device: torch.device) -> PlacementTables:
        """The tables of all layers, which follow the placement; made at the first call."""
        if self._tables is None:
            self._tables = PlacementTables(self.placement, self.rank, device, self.nearness)
        assert self._tables.slots.device.type == device.type, "one rank, one device"
        return self._tables

    def adopt(self, placement: Placement) -> None:
        """Have the next step go by another placement. Only between two steps, on every rank."""
        self.placement = placement
        if self._tables is not None:
            self._tables.adopt(placement)
