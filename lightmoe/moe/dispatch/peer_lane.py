"""One rank's end of the arenas: what it shares, pulls and gives, and when all ranks meet.

A rank overwrites its hidden states only after all ranks have read them: it goes on to the next
layer once it has waited for everyone's results, which each rank announces after its own pulls. It
writes results to a rank only once that has announced the next layer's choices, after adding up.

Through the host, hidden states are uploaded beside the gate, chunk by chunk, on a stream that
follows the one that has waited. With its choices a rank announces those of a step in one piece;
before each of several chunks is pulled the ranks meet once more, each after its own upload of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lightmoe.distributed.peers import PeerMemory
from lightmoe.errors import RankError
from lightmoe.kernels.exchange import Flags, give
from lightmoe.kernels.library import address
from lightmoe.moe.dispatch.arena import ArenaLayout, view_arena
from lightmoe.moe.dispatch.pair_counter import PairCounter
from lightmoe.moe.dispatch.peer_receipt import ChunkOfStep, PeerReceipt, Step
from lightmoe.moe.dispatch.upload import Upload
from lightmoe.moe.multiprocessors import multiprocessors_of
from lightmoe.moe.overlap_model import MAX_CHUNKS, chunk_of


class PeerLane:
    """One rank's end of the arenas: what all of its layers share. Calls come in layer order.

    `exchange_ctas` thread blocks carry rows where experts run beside them (None: the card's share),
    else as many as fit. The streams are those of a lane that it is `like`. `upload` is there where
    hidden states go through the host.
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
        self.exchange_ctas = exchange_ctas or multiprocessors_of(device, memory.road).exchange
        self.rank = rank
        self.memory = memory
        self.stream: torch.cuda.Stream = (
            like.stream if like else torch.cuda.Stream(device, priority=-1)
        )
        self.beside: torch.cuda.Stream = like.beside if like else torch.cuda.Stream(device)
        self.pair_counter = PairCounter(num_layers, device)
        self._timeout_seconds = timeout_seconds
        self._failure = torch.zeros(1, dtype=torch.int32).pin_memory()
        counters = torch.zeros(3, dtype=torch.int32, device=device)
        at = layout.offsets
        self._ticket = counters[2:]
        self._choice_flags = self._flags("choice_flags", counters[:1])
        self._pair_flags = self._flags("pair_flags", counters[1:])
        self._on_card = memory.road == "ipc"
        self.upload = None if self._on_card else self._new_upload(device, like)
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
        self._next_hidden: Tensor | None = None
        self._hidden: Tensor | None = None
        self._sent: Tensor | None = None
        self._step: tuple[tuple[object, ...], Step] | None = None

    @staticmethod
    def _new_upload(device: torch.device, like: PeerLane | None) -> Upload:
        if like is None:
            return Upload(torch.cuda.Stream(device))
        assert like.upload is not None, "lanes that are alike take the same road"
        return like.upload.of_another_lane()

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

    def publish(self, hidden: Tensor, num_chunks: int) -> None:
        """These are the hidden states [T, D] of the next `share`, which is of so many chunks.

        What is uploaded leaves at once: it must stay as it is until all chunks have been pulled.
        """
        self._next_hidden = hidden
        if self.upload is not None:
            self.upload.begin(self._parts_to_upload(hidden), len(hidden), num_chunks)

    def wait_for_upload(self, chunk: int) -> None:
        """Let the current stream wait until others can read a chunk of what was published."""
        if self.upload is not None:
            self.upload.wait(chunk)

    def share(
        self,
        experts: Tensor,
        weights: Tensor,
        num_tokens: int,
        num_chunks: int,
        pair_index: Tensor | None,
        prefixes: Tensor | None,
        num_real: Tensor | None,
        load: Tensor | None,
    ) -> None:
        """Let all ranks see this rank's choices and hidden states, and have everyone's choices.

        Of hidden states that are uploaded in chunks, others see none yet: `pull` waits for each.
        """
        layout, at = self.layout, self.layout.offsets
        hidden_to_copy = self._arriving(num_chunks)
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

    def _arriving(self, num_chunks: int) -> Tensor | None:
        """Have hidden states where others read them; returned if the kernel that shares does it."""
        hidden, self._next_hidden = self._next_hidden, None
        assert hidden is not None, "publish before share"
        if self.upload is None:
            return self._put_on_card(hidden)
        assert self.upload.num_chunks == num_chunks, "the step is published in its own chunks"
        if num_chunks == 1:
            self.upload.wait(0)
        return None

    def _put_on_card(self, hidden: Tensor) -> Tensor | None:
        """Put hidden states into this card's arena; returned if that is to be done yet."""
        self._read_own(self._arena_hidden)
        return hidden

    def _parts_to_upload(self, hidden: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """What goes where in the host's arena, each a row a token."""
        self._read_own(hidden)
        return ((hidden, self._arena_hidden),)

    def _read_own(self, hidden: Tensor) -> None:
        """This rank's own hidden states are read here until the next ones are published."""
        self._hidden = hidden
        self._hidden_addresses[self.rank] = address(hidden)

    def pull(self, receipt: PeerReceipt) -> None:
        """Fill the rows [P, D] of the chunk's pairs, and their weights if the experts need them."""
        assert self._hidden is not None, "share before dispatch"
        step = receipt.step
        if self.upload is not None and self.upload.num_chunks > 1:
            self.upload.wait(step.number)
            self.meet()
        receipt.chunk.pull(
            step.rows,
            self._hidden_addresses,
            block=self.layout.block,
            weights=self.shared_weights,
            pair_weight=receipt.pair_weight,
            results=self._result_addresses,
            output_rows=receipt.output_rows,
            max_ctas=step.dispatch_ctas,
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

    def step(
        self, tokens_per_rank: Sequence[int], num_chunks: int, num_rows: int, in_halves: bool
    ) -> Step:
        """What all layers of a step share, made once: every layer of it asks for the same."""
        step = (tokens_per_rank, num_chunks, num_rows, in_halves)
        if self._step is None or self._step[0] != step:
            chunks = [self._chunk_of_step(chunk, *step) for chunk in range(num_chunks)]
            self._step = (step, Step(chunks, self.prefixes[:num_chunks]))
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
            number=chunk,
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
        """Announce what this rank has given or uploaded so far, and wait for everyone's."""
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
