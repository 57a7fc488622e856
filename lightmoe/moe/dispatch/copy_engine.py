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
from collections.abc import Sequence
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
from lightmoe.kernels.library import address, library
from lightmoe.moe.dispatch.base import (
    Dispatcher,
    ExpertGroup,
    Receipt,
    TokensPerTile,
)
from lightmoe.moe.gate import Choice
from lightmoe.moe.overlap_model import MAX_CHUNKS, Multiprocessors, chunk_of
from lightmoe.moe.route import route_for

_OPERATIONS_PER_BYTE = 2200
"""989 TFLOP/s and 450 GB/s of H100 and H200 over NVLink. Through the host a byte takes longer, but
to run products beside each other there has not been measured."""

_ALIGNMENT_BYTES = 256


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

    @cached_property
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

    `exchange_ctas` thread blocks carry rows where experts run beside them (None: the card's share),
    else as many as fit. The streams are those of a lane that it is `like`.
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
        exchange_ctas: int | None = None,
        like: PeerLane | None = None,
    ) -> None:
        self.layout = layout
        self.exchange_ctas = exchange_ctas or multiprocessors_of(device).exchange
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
        self._own_choices = address(choices[rank])
        self._hidden_addresses = self._addresses("hidden", 0)
        self._published = self._hidden_addresses[rank]
        self._result_addresses = self._with_own(self._addresses("results", 0))
        # What each rank gave for this rank's tokens.
        own, step = memory.addresses[rank] + at["results"], layout.block.num_bytes
        self._given_addresses = self._with_own(
            [own + (step * giver if layout.summed else 0) for giver in range(layout.num_ranks)]
        )
        self._hidden: Tensor | None = None
        self._sent: Tensor | None = None
        self._step: tuple[tuple[object, ...], list[ChunkOfStep]] | None = None

    def _open_results(self) -> None:
        """Room for the addresses of results, and for what a rank gives itself if not its arena."""
        layout, device = self.layout, self.rows.device
        self._output_rows = torch.empty(layout.max_pairs, dtype=torch.int64, device=device)
        own_rows = 0 if self._on_card else layout.choice_stride
        self.own_results = self.rows.new_empty(own_rows, layout.width)

    @cached_property
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
        load: Tensor | None,
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
            self._published,
            self._ticket,
            load,
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
            self._read_own(self._arena_hidden)
            return hidden
        self._read_own(hidden)
        # The card's copy engine carries them: a kernel would wait for the bus.
        self._arena_hidden[: len(hidden)].copy_(hidden, non_blocking=True)
        return None

    def _read_own(self, hidden: Tensor) -> None:
        """This rank's own hidden states are read here until the next ones are published."""
        self._hidden = hidden
        self._hidden_addresses[self.rank] = address(hidden)

    def pull(self, receipt: PeerReceipt) -> None:
        """Fill the rows [P, D] of the chunk's pairs, and their weights if the experts need them."""
        assert self._hidden is not None, "share before dispatch"
        receipt.chunk.pull(
            receipt.step.rows,
            self._hidden_addresses,
            block=self.layout.block,
            on_cards=self._on_card,
            weights=self.shared_weights,
            pair_weight=receipt.pair_weight,
            results=self._result_addresses,
            output_rows=receipt.output_rows,
            max_ctas=receipt.step.dispatch_ctas,
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

    def pairs_of(self, first_pair: int, num_pairs: int) -> Tensor | None:
        """Where a chunk's results [P, D] go that stay here; None: none does."""
        return None

    def chunks_of_step(
        self, tokens_per_rank: Sequence[int], num_chunks: int, num_rows: int, in_halves: bool
    ) -> list[ChunkOfStep]:
        """What all layers of a step share, made once: every layer of it asks for the same."""
        step = (tokens_per_rank, num_chunks, num_rows, in_halves)
        if self._step is None or self._step[0] != step:
            chunks = [self._chunk_of_step(chunk, *step) for chunk in range(num_chunks)]
            self._step = (step, chunks)
        return self._step[1]

    def _chunk_of_step(
        self,
        chunk: int,
        tokens_per_rank: Sequence[int],
        num_chunks: int,
        num_rows: int,
        in_halves: bool,
    ) -> ChunkOfStep:
        per_token, num_ranks = self.layout.num_experts_per_token, self.layout.num_ranks
        spans = [chunk_of(tokens, chunk, num_chunks) for tokens in tokens_per_rank]
        counts = [span.stop - span.start for span in spans]
        first_pair = sum(span.start for span in spans) * per_token
        num_pairs = sum(counts) * per_token
        # The rows behind the tokens are padding; only a step in one chunk has any.
        padding = num_rows - tokens_per_rank[self.rank]
        own = spans[self.rank]
        beside_ctas = self.exchange_ctas
        return ChunkOfStep(
            begins=[span.start for span in spans],
            counts=counts,
            tokens=slice(own.start, own.stop + padding),
            num_pairs=num_pairs,
            expected_pairs=-(-num_pairs // num_ranks),
            prefixes=self.prefixes[chunk],
            own_prefixes=address(self.prefixes[chunk, self.rank]),
            rows=self.rows[first_pair:][:num_pairs],
            pairs=self.pairs_of(first_pair, num_pairs),
            pair_weight=self.pair_weight_of(first_pair, num_pairs),
            output_rows=self.output_rows_of(first_pair, num_pairs),
            dispatch_ctas=beside_ctas if chunk or in_halves else 0,
            combine_ctas=beside_ctas if self._combines_beside(chunk, num_chunks, in_halves) else 0,
        )

    @property
    def combines_here(self) -> bool:
        """Whether ranks give results into each other's cards, not sums, nor through the host."""
        return self._on_card and not self.layout.summed

    def _combines_beside(self, chunk: int, num_chunks: int, in_halves: bool) -> bool:
        return in_halves or (chunk + 1 < num_chunks and not self.combines_here)

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

    def give(self, receipt: PeerReceipt, pairs: Tensor) -> None:
        """Give the results [P, D] of a chunk: [0, D] where the experts have given them already."""
        if pairs.shape[0]:
            assert receipt.output_rows is not None
            most_ctas = receipt.step.combine_ctas
            give(pairs, receipt.output_rows, receipt.groups.offsets[-1:], most_ctas)

    def meet(self) -> None:
        """Announce that this rank has given its results so far, and wait for everyone's."""
        self._pair_flags.meet()

    def add_up(self, receipt: PeerReceipt, weights: Tensor, output: Tensor) -> None:
        """Add up the chunk's results of this rank's tokens into output [T of the chunk, D]."""
        layout = self.layout
        receipt.chunk.places.combine(
            output,
            self._given_addresses,
            receipt.step.own_prefixes,
            self._own_choices,
            weights,
            receipt.tokens.start,
            rank=self.rank,
            together=self._on_card,
            block=layout.block,
            summed=layout.summed,
            max_ctas=receipt.step.combine_ctas,
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
            num_layers = len(self._pairs_computed)
            num_chunks = len(noted) // num_layers
            if layers == [layer for layer in range(num_layers) for _ in range(num_chunks)]:
                if num_chunks > 1:
                    counts = counts.view(num_layers, num_chunks).sum(1, dtype=torch.int32)
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
class ChunkOfStep:
    """One chunk of a step, as all its layers have it.

    | field | meaning |
    |---|---|
    | begins, counts [W] | each rank's tokens |
    | tokens | this rank's, with what pads them |
    | num_pairs | of all ranks: so many rows [P, D] may come |
    | expected_pairs | of this rank, if all have alike |
    | prefixes, own_prefixes | where all ranks share theirs [W, E + 1]; the address of this rank's |
    | rows, pairs, pair_weight, output_rows | what the lane has for each pair; None: it has not |
    | dispatch_ctas, combine_ctas | thread blocks; 0 where the exchange has the device to itself |
    """

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


class CopyEngineDispatcher(Dispatcher):
    """The transport of GPUs: over NVLink, or through pinned memory of the host."""

    def __init__(
        self, group: ExpertGroup, layer: int, lane: PeerLane, tokens_per_tile: TokensPerTile
    ) -> None:
        self.stream, self.beside = lane.stream, lane.beside
        self.combines_here = lane.combines_here
        self.operations_per_byte = 0.0 if lane.layout.summed else _OPERATIONS_PER_BYTE
        self._group = group
        self._layer = layer
        self._lane = lane
        self._tokens_per_tile = tokens_per_tile
        self._hidden = lane.rows[:0]
        self._load: Tensor | None = None
        self._tables = group.tables_on(lane.rows.device)
        # They stay where they are when a placement changes.
        self._slots = self._tables.slots[layer]
        self._copy_ranks = self._tables.copy_ranks[layer]

    def most_tokens(self, hidden: Tensor) -> int:
        """Tokens of the fullest rank in this step."""
        return max(self._group.tokens_per_rank)

    def publish(self, hidden: Tensor) -> None:
        """These are the hidden states [T, D] of the next route."""
        self._hidden = hidden

    def counts_into(self, load: Tensor) -> bool:
        """The kernel that shares the choices counts them, too."""
        self._load = load
        return True

    def route(self, choice: Choice, num_chunks: int) -> list[PeerReceipt]:
        """Exchange the choices of all ranks, then route each chunk by its own counts."""
        assert num_chunks <= MAX_CHUNKS, "arenas have room for the prefixes of so many"
        group, lane = self._group, self._lane
        num_tokens = group.tokens_per_rank[group.rank]
        experts = choice.experts.to(torch.int32)
        num_rows, per_token = experts.shape
        chunks = lane.chunks_of_step(group.tokens_per_rank, num_chunks, num_rows, group.in_halves)
        if num_chunks == 1 and num_tokens * per_token <= COUNTED_PAIRS:
            prefixes = pair_index = None
        else:
            assert num_rows == num_tokens, "only small steps are padded"
            prefixes, pair_index = kernels.sort_chunks(
                experts, lane.layout.num_experts, [chunk.tokens for chunk in chunks]
            )
        lane.share(
            self._hidden,
            experts,
            choice.weights,
            num_tokens,
            num_chunks,
            pair_index,
            prefixes,
            group.num_real,
            self._load,
        )
        return [self._receipt(chunk) for chunk in chunks]

    def _receipt(self, chunk: ChunkOfStep) -> PeerReceipt:
        group, lane = self._group, self._lane
        expected = (chunk.expected_pairs, max(1, self._tables.num_held[self._layer]))
        split = kernels.route_split(
            chunk.prefixes,
            self._copy_ranks,
            self._slots,
            self._tokens_per_tile(*expected),
            chunk.num_pairs,
            route=route_for(group.route, chunk.num_pairs, lane.layout.num_experts),
            rank=group.rank,
            nearness=self._tables.nearness,
        )
        lane.note_pairs(self._layer, split.groups.offsets[-1:])
        return PeerReceipt(
            tokens=chunk.tokens,
            groups=split.groups,
            expected=expected,
            pair_weight=chunk.pair_weight,
            output_rows=chunk.output_rows,
            chunk=Chunk(
                chunk.begins,
                chunk.counts,
                Places(split.segments, self._copy_ranks),
                lane.choices,
                chunk.prefixes,
                group.rank,
                lane.layout.num_experts_per_token,
            ),
            step=chunk,
        )

    def dispatch(self, hidden: Tensor, receipt: Receipt) -> Tensor:
        """The row of every pair that this rank computes, from wherever its token is: [P, D]."""
        assert isinstance(receipt, PeerReceipt)
        self._lane.pull(receipt)
        return receipt.step.rows

    def output_of(self, receipt: Receipt) -> Tensor | None:
        """Where the experts write results that stay here; None: the receipt has their addresses."""
        assert isinstance(receipt, PeerReceipt)
        return receipt.step.pairs

    def combine(
        self, pairs: Tensor, weights: Tensor, receipt: Receipt, output: Tensor | None = None
    ) -> Tensor:
        """The sum of each token's results, once all ranks have given theirs."""
        if output is None:
            num_tokens = receipt.tokens.stop - receipt.tokens.start
            output = pairs.new_empty(num_tokens, pairs.shape[1])
        self.combine_all([pairs], weights, [receipt], [output])
        return output

    def combine_all(
        self,
        pairs: Sequence[Tensor],
        weights: Tensor,
        receipts: Sequence[Receipt],
        outputs: Sequence[Tensor],
    ) -> None:
        """combine of chunks whose results have all been computed: the ranks meet once."""
        lane = self._lane
        for given, receipt in zip(pairs, receipts, strict=True):
            assert isinstance(receipt, PeerReceipt)
            lane.give(receipt, given)
        lane.meet()
        for receipt, output in zip(receipts, outputs, strict=True):
            assert isinstance(receipt, PeerReceipt)
            lane.add_up(receipt, weights, output)


def multiprocessors_of(device: torch.device) -> Multiprocessors:
    """What the exchange and the experts have of a card beside each other; of no card, one each."""
    if device.type != "cuda":
        return Multiprocessors(1, 1)
    card = torch.cuda.get_device_properties(device)
    claims = library().architecture_of(device) == "90"
    return Multiprocessors.of(card.multi_processor_count, claims_tiles=claims)


def view_arena(arena: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A part of an arena as a tensor."""
    num_bytes = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    return arena[offset : offset + num_bytes].view(dtype).view(shape)
