"""Experts spread over GPUs whose memory, or pinned host memory, all ranks' kernels address.

No host takes part in a step: choices are pushed to all ranks, every rank computes the same route on
its device and pulls the rows of the pairs that are its own, and the experts' last product writes
each result where its token's rank adds it up. So results take no multiprocessors from the experts,
nothing needs a size on the host, and a step may be one CUDA graph.

A rank overwrites its hidden states only after all ranks have read them: it goes on to the next
layer once it has waited for everyone's results, which each rank announces after its own pulls. It
writes results to a rank only once that has announced the next layer's choices, after adding up.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.distributed.peers import PeerMemory
from lightmoe.errors import RankError, UsageError
from lightmoe.kernels.exchange import (
    COUNTED_PAIRS,
    MAX_RANKS,
    MAX_TOKENS,
    Chunk,
    Flags,
    Places,
    RowBlock,
    give,
)
from lightmoe.kernels.library import address
from lightmoe.moe.dispatch.base import (
    Dispatcher,
    ExpertGroup,
    Receipt,
    TokensPerTile,
    chunk_of,
)
from lightmoe.moe.gate import Choice
from lightmoe.moe.overlap_model import EXCHANGE_CTAS, MAX_CHUNKS
from lightmoe.moe.route import route_for

_ALIGNMENT_BYTES = 256
_ANY_TILE = 64
"""Pairs a tile where the table of tiles is not used."""


@dataclass(frozen=True, kw_only=True)
class ArenaLayout:
    """What lies where in every rank's arena; `max_tokens` is what one rank runs in a step.

    With `summed` ranks give one weighted sum a token (summing.py), with `as_int8` that and the
    hidden states as int8.
    """

    num_ranks: int
    max_tokens: int
    num_experts: int
    num_experts_per_token: int
    width: int
    element_bytes: int
    summed: bool = False
    as_int8: bool = False

    def __post_init__(self) -> None:
        if self.num_ranks > MAX_RANKS or self.max_tokens >= MAX_TOKENS:
            raise UsageError(
                f"{self.num_ranks} ranks of {self.max_tokens} tokens a step; transport copy_engine"
                f" takes at most {MAX_RANKS} of fewer than {MAX_TOKENS}; use --transport nccl"
            )
        if self.as_int8 and (self.element_bytes != 2 or self.width % 16 or not self.summed):
            raise UsageError(
                f"payload int8 for rows of {self.width} numbers of {self.element_bytes} bytes,"
                f" summed {self.summed}; it takes a multiple of 16 of 2 bytes, and sums;"
                " use --payload full"
            )

    @property
    def max_pairs(self) -> int:
        """Pairs that one rank may have to compute for a step: all of them."""
        return self.num_ranks * self.max_tokens * self.num_experts_per_token

    @property
    def choice_stride(self) -> int:
        """Choices that a rank has room for."""
        return self.max_tokens * self.num_experts_per_token

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each part, in order."""
        prefixes = MAX_CHUNKS * self.num_ranks * (self.num_experts + 1)
        choices = self.num_ranks * self.choice_stride
        return {
            "choice_flags": 4 * MAX_RANKS,
            "pair_flags": 4 * MAX_RANKS,
            "choices": 4 * choices,
            "prefixes": 4 * prefixes,
            "weights": 4 * choices if self.summed else 0,
            "hidden": self.block.num_bytes,
            "results": self.num_ranks * self.block.num_bytes if self.summed else self._result_bytes,
        }

    @property
    def block(self) -> RowBlock:
        """The hidden states of a rank, or the sums that a rank has for another's tokens."""
        return RowBlock(self.max_tokens, self.width, self.element_bytes, self.as_int8)

    @property
    def row_bytes(self) -> int:
        """Of a row that does not travel."""
        return self.width * self.element_bytes

    @property
    def _pair_bytes(self) -> int:
        return self.max_pairs * self.row_bytes

    @property
    def _result_bytes(self) -> int:
        """Of this rank's own tokens."""
        return self.choice_stride * self.row_bytes

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each part begins, and `end`."""
        padded = [-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in self.sizes.values()]
        return dict(zip((*self.sizes, "end"), itertools.accumulate(padded, initial=0), strict=True))

    @property
    def num_bytes(self) -> int:
        """Size of an arena."""
        return self.offsets["end"]

    @property
    def device_bytes(self) -> int:
        """What a rank needs beside its arena, at most.

        The pulled rows, and the addresses of their results, or results and weights to sum.
        """
        if self.summed:
            return 2 * self._pair_bytes + 4 * self.max_pairs
        carried = 0 if self.element_bytes == 2 else self._pair_bytes
        return self._pair_bytes + carried + self._result_bytes + 8 * self.max_pairs


class PeerLane:
    """One rank's end of the arenas: what all of its layers share. Calls come in layer order.

    `exchange_ctas` thread blocks carry rows where experts run beside them, else as many as fit. The
    streams are those of a lane that it is `like`.
    """

    def __init__(
        self,
        layout: ArenaLayout,
        memory: PeerMemory,
        rank: int,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        timeout_seconds: float,
        exchange_ctas: int = EXCHANGE_CTAS,
        like: PeerLane | None = None,
    ) -> None:
        self.layout = layout
        self.exchange_ctas = exchange_ctas
        self.rank = rank
        self.memory = memory
        self.stream: torch.cuda.Stream = (
            like.stream if like else torch.cuda.Stream(device, priority=-1)
        )
        self.beside: torch.cuda.Stream = like.beside if like else torch.cuda.Stream(device)
        self._pairs_computed = torch.zeros(num_layers, dtype=torch.int32, device=device)
        self._noted: list[tuple[int, Tensor]] = []
        self._timeout_seconds = timeout_seconds
        self._failure = torch.zeros(1, dtype=torch.int32).pin_memory()
        counters = torch.zeros(3, dtype=torch.int32, device=device)
        at = layout.offsets
        self._ticket = counters[2:]
        self._choice_flags = self._flags("choice_flags", counters[:1])
        self._pair_flags = self._flags("pair_flags", counters[1:])
        self._on_card = memory.road == "ipc"
        here = memory.arena
        choice_shape = (layout.num_ranks, layout.choice_stride)
        choices = view_arena(here, at["choices"], choice_shape, torch.int32)
        prefix_shape = (MAX_CHUNKS, layout.num_ranks, layout.num_experts + 1)
        prefixes = view_arena(here, at["prefixes"], prefix_shape, torch.int32)
        self._arena_choices, self._arena_prefixes = choices, prefixes
        shape = (layout.max_pairs, layout.width)
        self.rows = torch.empty(shape, dtype=dtype, device=device)
        self._open_results()
        if not self._on_card:
            choices, prefixes = choices.to(device), prefixes.to(device)
        self.choices, self.prefixes = choices, prefixes
        self._hidden: Tensor | None = None
        self._sent: Tensor | None = None

    def _open_results(self) -> None:
        """Room for the addresses of results, and for what a rank gives itself if not its arena."""
        layout, device = self.layout, self.rows.device
        self._output_rows = torch.empty(layout.max_pairs, dtype=torch.int64, device=device)
        own_rows = 0 if self._on_card else layout.choice_stride
        self.own_results = self.rows.new_empty(own_rows, layout.width)

    @property
    def _arena_hidden(self) -> Tensor:
        layout = self.layout
        shape = (layout.max_tokens, layout.width)
        return view_arena(self.memory.arena, layout.offsets["hidden"], shape, self.rows.dtype)

    def _flags(self, name: str, counter: Tensor) -> Flags:
        return Flags(
            self.memory.addresses,
            self.layout.offsets[name],
            self.rank,
            counter,
            self._failure,
            self._timeout_seconds,
        )

    def share(
        self,
        hidden: Tensor,
        experts: Tensor,
        weights: Tensor,
        num_tokens: int,
        num_chunks: int,
        pair_index: Tensor | None,
        prefixes: Tensor | None,
        num_real: Tensor | None,
    ) -> None:
        """Let all ranks see this rank's hidden states and choices, and have everyone's choices."""
        layout, at = self.layout, self.layout.offsets
        hidden_to_copy = self._publish(hidden)
        self._choice_flags.share(
            experts,
            pair_index,
            prefixes,
            num_real,
            weights if layout.summed else None,
            hidden_to_copy,
            self._addresses("hidden", 0)[self.rank],
            self._ticket,
            num_tokens=num_tokens,
            num_experts=layout.num_experts,
            choice_offset=at["choices"] + 4 * self.rank * layout.choice_stride,
            prefix_offset=at["prefixes"] + 4 * self.rank * (layout.num_experts + 1),
            weight_offset=at["weights"] + 4 * self.rank * layout.choice_stride,
        )
        self._have_shared(num_chunks)

    def _have_shared(self, num_chunks: int) -> None:
        """Have what all ranks shared where kernels look it up for every pair: on the card."""
        if not self._on_card:
            self.choices.copy_(self._arena_choices, non_blocking=True)
            self.prefixes[:num_chunks].copy_(self._arena_prefixes[:num_chunks], non_blocking=True)

    def _publish(self, hidden: Tensor) -> Tensor | None:
        """Begin to put hidden states where others read them; returned if that is to be done yet."""
        if self._on_card:
            self._hidden = self._arena_hidden
            return hidden
        self._hidden = hidden
        # The card's copy engine carries them: a kernel would wait for the bus.
        self._arena_hidden[: len(hidden)].copy_(hidden, non_blocking=True)
        return None

    def pull(self, receipt: PeerReceipt, rows: Tensor, max_ctas: int) -> None:
        """Fill the rows [P, D] of the chunk's pairs, and their weights if the experts need them."""
        assert self._hidden is not None, "share before dispatch"
        addresses = self._addresses("hidden", 0)
        addresses[self.rank] = self._hidden.data_ptr()
        receipt.chunk.pull(
            rows,
            addresses,
            block=self.layout.block,
            on_cards=self._on_card,
            weights=self.shared_weights,
            pair_weight=receipt.pair_weight,
            results=self._with_own(self._addresses("results", 0)),
            output_rows=receipt.output_rows,
            max_ctas=max_ctas,
        )
        if self._sent is not None:
            receipt.chunk.count(self._sent, summed=self.layout.summed)

    @property
    def shared_weights(self) -> Tensor | None:
        """The routing weights of all ranks, fp32 [W, S], where the experts apply them."""
        return None

    def pair_weight_of(self, first_pair: int, num_pairs: int) -> Tensor | None:
        """Where the weights [P] of a chunk's pairs come to lie; None: combine applies them."""
        return None

    def output_rows_of(self, first_pair: int, num_pairs: int) -> Tensor | None:
        """Where the addresses [P] of a chunk's results come to lie; None: they stay here."""
        return self._output_rows[first_pair:][:num_pairs]

    def pairs_of(self, receipt: PeerReceipt) -> Tensor | None:
        """Where the chunk's results go that stay here: [P, D]; None: none does."""
        return None

    def count_sent(self) -> None:
        """Count from now on what this rank sends: a small kernel more a chunk."""
        shape = (2, self.layout.num_ranks)
        self._sent = torch.zeros(shape, dtype=torch.int64, device=self.rows.device)

    def take_bytes_sent(self) -> np.ndarray | None:
        """Bytes of rows and results for each rank [W] since last asked; None: not counted."""
        if self._sent is None:
            return None
        sent: np.ndarray = self._sent.sum(0).cpu().numpy() * self.layout.block.bytes_on_link
        self._sent.zero_()
        sent[self.rank] = 0  # what stays does not travel
        return sent

    def combine(
        self, receipt: PeerReceipt, pairs: Tensor, weights: Tensor, output: Tensor, max_ctas: int
    ) -> None:
        """Announce that this rank's results are given, wait for everyone's, and add up its own.

        `pairs` [P, D] are carried to where the experts have not written them: [0, D] if they have.
        """
        if len(pairs):
            assert receipt.output_rows is not None
            give(pairs, receipt.output_rows, receipt.groups.offsets[-1:], max_ctas)
        self._add_up(receipt, weights, output, max_ctas)

    def _add_up(self, receipt: PeerReceipt, weights: Tensor, output: Tensor, max_ctas: int) -> None:
        self._pair_flags.meet()
        layout = self.layout
        here = self._addresses("results", 0)[self.rank]
        step = layout.block.num_bytes if layout.summed else 0
        results = [here + rank * step for rank in range(layout.num_ranks)]
        receipt.chunk.places.combine(
            output,
            self._with_own(results),
            receipt.chunk.prefixes[self.rank],
            address(self.choices[self.rank]),
            weights,
            receipt.tokens.start,
            rank=self.rank,
            together=self._on_card,
            block=layout.block,
            summed=layout.summed,
            max_ctas=max_ctas,
        )

    def _with_own(self, addresses: list[int]) -> list[int]:
        """The same but this rank's own, if that is not in the arena."""
        if not self._on_card:
            addresses[self.rank] = address(self.own_results)
        return addresses

    def note_pairs(self, layer: int, count: Tensor) -> None:
        """int32 [1]: pairs of one of this step's chunks."""
        self._noted.append((layer, count))

    def count_pairs(self) -> None:
        """Add up what was noted; part of the step, so also of its graph."""
        noted, self._noted = self._noted, []
        if noted:
            layers = [layer for layer, _ in noted]
            counts = torch.cat([count for _, count in noted])
            if layers == list(range(len(self._pairs_computed))):
                self._pairs_computed.add_(counts)
            else:
                for layer, count in zip(layers, counts, strict=True):
                    self._pairs_computed[layer].add_(count)

    def move_pairs(self) -> Tensor:
        """Pairs computed here since last asked, int32 [L], on the device: nothing waits for it."""
        counts = self._pairs_computed.clone()
        self._pairs_computed.zero_()
        return counts

    def check(self) -> None:
        """RankError with the late rank's name, if a wait has ended without it."""
        late = int(self._failure[0])
        if late:
            raise RankError(
                f"rank {late - 1} did not answer rank {self.rank} within"
                f" {self._timeout_seconds:.0f} s; it is stopped, dead or out of step"
            )

    def _addresses(self, part: str, offset: int) -> list[int]:
        begin = self.layout.offsets[part] + offset
        return [arena + begin for arena in self.memory.addresses]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerReceipt(Receipt):
    """Which tokens of each rank the chunk has and where their pairs go, and where results lie.

    The first dispatch and the last combine have the device to themselves: 0 thread blocks bound
    them.
    """

    chunk: Chunk
    first_pair: int
    dispatch_ctas: int = 0
    combine_ctas: int = 0


class CopyEngineDispatcher(Dispatcher):
    """The transport of GPUs: over NVLink, or through pinned memory of the host."""

    def __init__(
        self, group: ExpertGroup, layer: int, lane: PeerLane, tokens_per_tile: TokensPerTile
    ) -> None:
        self.stream, self.beside = lane.stream, lane.beside
        self._group = group
        self._layer = layer
        self._lane = lane
        self._tokens_per_tile = tokens_per_tile
        self._hidden = lane.rows[:0]
        self._tables = group.tables_on(lane.rows.device)

    def most_tokens(self, hidden: Tensor) -> int:
        """Tokens of the fullest rank in this step."""
        return max(self._group.tokens_per_rank)

    def publish(self, hidden: Tensor) -> None:
        """These are the hidden states [T, D] of the next route."""
        self._hidden = hidden

    def route(self, choice: Choice, num_chunks: int) -> list[PeerReceipt]:
        """Exchange the choices of all ranks, then route each chunk by its own counts."""
        assert num_chunks <= MAX_CHUNKS, "arenas have room for the prefixes of so many"
        group = self._group
        num_tokens = group.tokens_per_rank[group.rank]
        experts = choice.experts.to(torch.int32)
        if num_chunks == 1 and num_tokens * experts.shape[1] <= COUNTED_PAIRS:
            prefixes = pair_index = None
        else:
            assert len(experts) == num_tokens, "only small steps are padded"
            prefixes, pair_index = self._sort(experts, num_chunks)
        self._lane.share(
            self._hidden,
            experts,
            choice.weights,
            num_tokens,
            num_chunks,
            pair_index,
            prefixes,
            group.num_real,
        )
        return [
            self._receipt(chunk, num_chunks, len(experts) - num_tokens)
            for chunk in range(num_chunks)
        ]

    def _sort(self, experts: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
        """Prefix sums of pairs per expert [C, E + 1], and each pair's place in its chunk [T, K]."""
        slots = self._tables.slots[self._layer]
        parts = []
        for chunk in range(num_chunks):
            span = chunk_of(len(experts), chunk, num_chunks)
            groups, _, index = kernels.sort_pairs(experts[span], len(slots), slots, _ANY_TILE)
            parts.append((groups.offsets, index))
        if num_chunks == 1:
            return parts[0][0].view(1, -1), parts[0][1]
        return torch.stack([part for part, _ in parts]), torch.cat([part for _, part in parts])

    def _receipt(self, chunk: int, num_chunks: int, padding: int) -> PeerReceipt:
        group, lane = self._group, self._lane
        per_token = lane.layout.num_experts_per_token
        spans = [chunk_of(tokens, chunk, num_chunks) for tokens in group.tokens_per_rank]
        num_tokens = sum(span.stop - span.start for span in spans)
        held = self._tables.num_held[self._layer]
        expected = (-(-num_tokens * per_token // len(spans)), max(1, held))
        split = kernels.route_split(
            lane.prefixes[chunk],
            self._tables.copy_ranks[self._layer],
            self._tables.slots[self._layer],
            self._tokens_per_tile(*expected),
            num_tokens * per_token,
            route=route_for(group.route, num_tokens * per_token, lane.layout.num_experts),
            rank=group.rank,
        )
        lane.note_pairs(self._layer, split.groups.offsets[-1:])
        first_pair = sum(span.start for span in spans) * per_token
        return PeerReceipt(
            tokens=slice(spans[group.rank].start, spans[group.rank].stop + padding),
            groups=split.groups,
            expected=expected,
            pair_weight=lane.pair_weight_of(first_pair, split.groups.num_pairs),
            output_rows=lane.output_rows_of(first_pair, split.groups.num_pairs),
            chunk=Chunk(
                spans,
                Places(split.segments, self._tables.copy_ranks[self._layer]),
                lane.choices,
                lane.prefixes[chunk],
                group.rank,
                per_token,
            ),
            first_pair=first_pair,
            dispatch_ctas=lane.exchange_ctas if chunk or group.in_halves else 0,
            combine_ctas=lane.exchange_ctas if chunk + 1 < num_chunks or group.in_halves else 0,
        )

    def dispatch(self, hidden: Tensor, receipt: Receipt) -> Tensor:
        """The row of every pair that this rank computes, from wherever its token is: [P, D]."""
        assert isinstance(receipt, PeerReceipt)
        rows = self._lane.rows[receipt.first_pair :][: receipt.groups.num_pairs]
        self._lane.pull(receipt, rows, receipt.dispatch_ctas)
        return rows

    def output_of(self, receipt: Receipt) -> Tensor | None:
        """Where the experts write results that stay here; None: the receipt has their addresses."""
        assert isinstance(receipt, PeerReceipt)
        return self._lane.pairs_of(receipt)

    def combine(self, pairs: Tensor, weights: Tensor, receipt: Receipt) -> Tensor:
        """The sum of each token's results, once all ranks have given theirs."""
        assert isinstance(receipt, PeerReceipt)
        num_tokens = receipt.tokens.stop - receipt.tokens.start
        output = pairs.new_empty(num_tokens, pairs.shape[1])
        self._lane.combine(receipt, pairs, weights, output, receipt.combine_ctas)
        return output


def view_arena(arena: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A part of an arena as a tensor."""
    num_bytes = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    return arena[offset : offset + num_bytes].view(dtype).view(shape)
