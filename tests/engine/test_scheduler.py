"""One rank's schedule: budgets, chunks, preemption; nobody loses a token or shares a block."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.core import SequenceStep
from lightmoe.engine.kv_blocks import KVBlocks
from lightmoe.engine.scheduler import Scheduler
from lightmoe.engine.sequence import Sequence
from tests.engine.fakes import BLOCK_SIZE, FakeRank, expected_tokens, new_request


def new_sequence(sequence_id: int, prompt: list[int], max_tokens: int) -> Sequence:
    return Sequence(
        sequence_id=sequence_id,
        request=new_request(str(sequence_id), prompt, max_tokens=max_tokens),
        on_output=lambda output: None,
        rank=0,
        max_tokens=max_tokens,
        stop_ids=frozenset(),
        seed=0,
        token_ids=list(prompt),
    )


class Rank:
    """A scheduler with a fake rank under it, stepped by hand."""

    def __init__(self, num_blocks: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.scheduler = Scheduler(
            KVBlocks(num_blocks, BLOCK_SIZE), max_num_seqs, max_num_batched_tokens
        )
        self.max_num_seqs = max_num_seqs
        self.fake = FakeRank(num_blocks, max_num_seqs, max_num_batched_tokens)
        self.live: dict[int, Sequence] = {}
        self.answers: dict[int, list[int]] = {}

    def add(self, prompt: list[int], max_tokens: int) -> int:
        sequence = new_sequence(len(self.answers), prompt, max_tokens)
        self.live[sequence.sequence_id] = sequence
        self.answers[sequence.sequence_id] = []
        self.scheduler.add(sequence)
        return sequence.sequence_id

    def abort(self, sequence_id: int) -> None:
        if (sequence := self.live.pop(sequence_id, None)) is not None:
            self.scheduler.remove(sequence)

    def step(self) -> tuple[SequenceStep, ...]:
        plan = self.scheduler.schedule()
        assert len(self.scheduler.running) <= self.max_num_seqs
        for token in self.fake.run(plan):
            sequence = self.live[token.sequence_id]
            self.answers[token.sequence_id].append(token.token_id)
            if sequence.append(token.token_id) is not None:
                del self.live[token.sequence_id]
                self.scheduler.remove(sequence)
        self.check_blocks()
        return plan

    def check_blocks(self) -> None:
        """Every block is free or belongs to one sequence."""
        blocks = self.scheduler.blocks
        owners = Counter(block for one in self.live.values() for block in one.block_table)
        assert all(count == 1 for count in owners.values())
        assert len(owners) + blocks.num_free == blocks.num_blocks
        assert blocks.usage == pytest.approx(len(owners) / blocks.num_blocks)

    def finish(self) -> int:
        """Steps until nothing is left."""
        num_steps = 0
        while self.live:
            assert self.step(), "nothing was scheduled although sequences wait"
            num_steps += 1
            assert num_steps < 2000, "the schedule does not end"
        assert self.scheduler.num_sequences == 0
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks
        return num_steps


prompts = st.lists(st.integers(0, 49), min_size=1, max_size=30)
arrivals = st.tuples(st.just("add"), prompts, st.integers(1, 20))
aborts = st.tuples(st.just("abort"), st.integers(0, 30))
events = st.lists(st.one_of(arrivals, arrivals, aborts, st.just(("step",))), max_size=40)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    events=events,
    num_blocks=st.integers(13, 40),
    max_num_seqs=st.integers(1, 6),
    spare_budget=st.integers(0, 20),
)
def test_any_arrivals_and_aborts_leave_every_answer_as_if_alone(
    events: list[tuple[object, ...]], num_blocks: int, max_num_seqs: int, spare_budget: int
) -> None:
    # The longest sequence, 30 + 20 tokens, fits the smallest pool: 13 blocks of 4.
    rank = Rank(num_blocks, max_num_seqs, max_num_seqs + spare_budget)
    wanted: dict[int, list[int]] = {}
    for event in events:
        if event[0] == "add":
            prompt, max_tokens = event[1], event[2]
            wanted[rank.add(prompt, max_tokens)] = expected_tokens(prompt, max_tokens)
        elif event[0] == "abort":
            if event[1] in rank.live:
                del wanted[event[1]]
            rank.abort(event[1])
            rank.check_blocks()
        else:
            rank.step()

    rank.finish()

    assert {one: rank.answers[one] for one in wanted} == wanted


def test_a_full_cache_preempts_the_newest_and_all_still_finish() -> None:
    rank = Rank(num_blocks=13, max_num_seqs=4, max_num_batched_tokens=40)
    prompts = [[one, 2, 3, 4, 5, 6] for one in range(4)]
    for prompt in prompts:
        rank.add(prompt, 20)

    rank.finish()

    assert rank.scheduler.num_preemptions > 0
    assert [rank.answers[one] for one in range(4)] == [
        expected_tokens(prompt, 20) for prompt in prompts
    ]


def test_the_oldest_sequence_is_never_preempted() -> None:
    rank = Rank(num_blocks=8, max_num_seqs=3, max_num_batched_tokens=24)
    for one in range(3):
        rank.add([one] * 6, 20)

    positions = []
    while 0 in rank.live:
        positions += [part.start for part in rank.step() if part.sequence_id == 0]

    assert rank.scheduler.num_preemptions > 0
    assert positions == [0, *range(6, 25)]


def test_a_long_prompt_runs_in_chunks_beside_decodes() -> None:
    rank = Rank(num_blocks=40, max_num_seqs=4, max_num_batched_tokens=8)
    rank.add([1, 2], 20)
    rank.step()
    rank.add(list(range(20)), 3)

    plans = [rank.step() for _ in range(4)]

    # One token is the other sequence's, every step; it comes first.
    assert [[len(part.token_ids) for part in plan] for plan in plans] == [
        [1, 7],
        [1, 7],
        [1, 6],
        [1, 1],
    ]
    assert [plan[1].start for plan in plans] == [0, 7, 14, 20]
    assert [plan[1].sampling is not None for plan in plans] == [False, False, True, True]


def test_decodes_come_before_an_older_unfinished_prompt() -> None:
    rank = Rank(num_blocks=40, max_num_seqs=4, max_num_batched_tokens=4)
    long = rank.add(list(range(20)), 3)
    rank.step()
    # 4 of 20 tokens are done; the next budget would be eaten by the rest of them.
    short = new_sequence(99, [1, 2], 5)
    short.token_ids.append(3)
    short.num_computed = 2
    assert rank.scheduler.blocks.extend(short.block_table, 3)
    rank.scheduler.running.append(short)

    plan = rank.scheduler.schedule()

    assert [(part.sequence_id, len(part.token_ids)) for part in plan] == [(99, 1), (long, 3)]


def test_a_prompt_waits_until_all_of_it_fits() -> None:
    rank = Rank(num_blocks=6, max_num_seqs=4, max_num_batched_tokens=40)
    first = rank.add(list(range(12)), 4)  # 3 blocks of prompt, and the fourth for its answer
    second = rank.add(list(range(9)), 4)

    assert [part.sequence_id for part in rank.step()] == [first]
    assert rank.scheduler.blocks.num_free == 2
    assert [one.sequence_id for one in rank.scheduler.waiting] == [second]
    rank.finish()


def test_no_more_run_than_may() -> None:
    rank = Rank(num_blocks=40, max_num_seqs=2, max_num_batched_tokens=40)
    for one in range(5):
        rank.add([one, one], 2)

    assert [part.sequence_id for part in rank.step()] == [0, 1]
    assert len(rank.scheduler.waiting) == 3
    rank.finish()


def test_blocks_are_taken_whole_or_not_at_all() -> None:
    blocks = KVBlocks(num_blocks=3, block_size=4)
    table: list[int] = []

    assert blocks.extend(table, 5)
    assert len(table) == 2
    assert blocks.extend(table, 8)
    assert len(table) == 2
    assert not blocks.extend(table, 13)
    assert len(table) == 2
    assert blocks.num_free == 1
    blocks.release(table)
    assert (table, blocks.num_free, blocks.usage) == ([], 3, 0.0)


def test_moved_pairs_of_what_runs_again_are_told_once() -> None:
    sequence = new_sequence(0, [1, 2, 3], max_tokens=4)

    sequence.note_moved(0, [1, 0])
    first = sequence.take_moved()
    sequence.note_moved(0, [2, 0, 1, 3])  # it was preempted

    assert (first, sequence.take_moved()) == (((0, 1),), ((2, 1), (3, 3)))
