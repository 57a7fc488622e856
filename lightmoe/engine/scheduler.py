"""What one rank runs in the next step: decodes first, then prompts in chunks, within two budgets.

Preemption is by recomputation: when the cache is full the newest sequence gives its blocks back
and starts again later, with the tokens that it already has.
"""

from __future__ import annotations

from collections import deque

from lightmoe.core import SequenceStep
from lightmoe.engine.kv_blocks import KVBlocks
from lightmoe.engine.sequence import Sequence


class Scheduler:
    """Continuous batching for one rank."""

    def __init__(self, blocks: KVBlocks, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.release(sequence.block_table)

    @property
    def num_sequences(self) -> int:
        """Sequences that run or wait here."""
        return len(self.running) + len(self.waiting)

    def schedule(self) -> tuple[SequenceStep, ...]:
        """This rank's part of the next step."""
        budget = self._max_num_batched_tokens
        steps: dict[int, SequenceStep] = {}
        # Decodes first: an unfinished prompt takes whatever budget it finds.
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_waiting > 1):
            num_tokens = min(sequence.num_waiting, budget)
            if sequence not in self.running or not num_tokens:
                continue  # preempted by an earlier one, or no budget left
            if self._make_room(sequence, sequence.num_computed + num_tokens, steps):
                steps[sequence.sequence_id] = sequence.plan(num_tokens)
                budget -= num_tokens
        while self.waiting and budget and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            # All of it must fit now: half a prompt in a full cache would only push others out.
            if not self.blocks.extend(sequence.block_table, sequence.num_tokens + 1):
                break
            self.running.append(self.waiting.popleft())
            num_tokens = min(sequence.num_waiting, budget)
            if not num_tokens:
                continue  # preempted while its last token is being chosen
            steps[sequence.sequence_id] = sequence.plan(num_tokens)
            budget -= num_tokens
        return tuple(steps.values())

    def _make_room(
        self, sequence: Sequence, num_positions: int, steps: dict[int, SequenceStep]
    ) -> bool:
        """Blocks for that many positions, if need be from the newest that are not in this step."""
        while not self.blocks.extend(sequence.block_table, num_positions):
            newest = next(
                other for other in reversed(self.running) if other.sequence_id not in steps
            )
            self._preempt(newest)
            if newest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.block_table)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
