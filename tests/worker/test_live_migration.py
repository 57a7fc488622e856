"""Ten ranks serve while their experts move at every step: no bit of an answer changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightmoe.balancer.migration import Costs, Migration
from lightmoe.core import BalanceReport, Orders, SamplingParams, StepResult
from lightmoe.engine.worker_group import WorkerGroup
from lightmoe.moe.placement import Placement
from lightmoe.worker.config import WorkerConfig
from lightmoe.worker.local_group import LocalWorkerGroup
from tests.models.folders import write_model
from tests.moe.cases import placement_of, random_copies
from tests.worker.groups import generate, new_config, running_engine

NUM_RANKS = 10
PROMPTS = [tuple((7 * one + 3 * place) % 50 for place in range(3 + 5 * one)) for one in range(12)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
NUM_FREE_SLOTS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def quiet(folder: Path) -> list[list[int]]:
    with running_engine(new_config(folder, 1, max_num_seqs=12), 12, 64) as engine:
        return generate(engine, PROMPTS, PARAMS)


class Restless:
    """A StepBalancer that goes from one random placement to the next, for ever."""

    def __init__(self, group: WorkerGroup, bytes_per_step: int, from_host: bool = False) -> None:
        self._num_slots = [rank.num_slots for rank in group.ranks]
        self._costs = Costs(
            expert_bytes=group.ranks[0].expert_bytes,
            bytes_per_step=bytes_per_step,
            from_host=from_host,
        )
        self._generator = np.random.default_rng(bytes_per_step)
        self._migration: Migration | None = None
        self._next_transfer = 0
        self.epochs: list[int] = []
        self.num_pieces = 0
        self.num_goals = 0

    def orders(self, placement: Placement, route: str) -> tuple[Orders, Placement]:
        if self._migration is None or self._migration.is_done:
            if self._migration is not None:
                self._next_transfer = self._migration.num_transfers
                self.num_goals += 1
            self._migration = Migration(
                placement,
                self._goal(placement),
                self._num_slots,
                self._costs,
                None,
                self._next_transfer,
            )
        changes, pieces = self._migration.orders()
        self.num_pieces += len(pieces)
        if changes:
            placement = placement.changed(changes, placement.epoch + 1)
            self.epochs.append(placement.epoch)
        return Orders(placement.epoch, changes, pieces), placement

    def _goal(self, placement: Placement) -> Placement:
        num_layers, num_experts, num_ranks = placement.slot_table.shape
        while True:
            copies = [
                random_copies(self._generator, num_experts, num_ranks, 6) for _ in range(num_layers)
            ]
            goal = placement_of(copies, num_ranks)
            if all(goal.num_slots(rank) < count for rank, count in enumerate(self._num_slots)):
                return goal

    def observe(self, expert_tokens: np.ndarray, results: Sequence[StepResult]) -> None:
        arrivals = [result.arrivals for result in results if result.arrivals is not None]
        assert not [arrival.error for arrival in arrivals if arrival.error]
        assert self._migration is not None
        self._migration.arrived(number for one in arrivals for number in one.transfers)

    def report(self) -> BalanceReport:
        raise AssertionError("no test here asks for a report")

    def close(self) -> None:
        """Nothing to end."""


def moving_config(folder: Path, host_copy: bool = False) -> WorkerConfig:
    config = new_config(folder, NUM_RANKS, num_spares=2, max_num_seqs=4)
    return replace(config, num_free_slots=NUM_FREE_SLOTS, host_copy=host_copy)


def slot_bytes(group: LocalWorkerGroup, rank: int, slot: int) -> bytes:
    mover = group._workers[rank]._mover
    assert mover is not None
    return mover._slots[slot].numpy().tobytes()


def check_slots(group: LocalWorkerGroup, wanted: dict[tuple[int, int], bytes]) -> None:
    """Every slot that the placement names holds the bytes that its expert has from the start."""
    placement = group.placement
    for rank in range(placement.num_ranks):
        for layer, expert, slot in placement.hosted(rank):
            assert slot_bytes(group, rank, slot) == wanted[layer, expert]
        there = group._workers[rank]._group
        assert there is not None
        assert there.placement.epoch == placement.epoch
        assert np.array_equal(there.placement.slot_table, placement.slot_table)
        tables = there.tables_on(torch.device("cpu"))
        assert np.array_equal(tables.slots.numpy(), placement.slot_table[:, :, rank])
        assert tables.copies == list(placement.copies)


@pytest.mark.parametrize(
    ("bytes_per_step", "from_host"), [(1000, False), (1 << 20, False), (4096, True)]
)
def test_tokens_are_equal_while_experts_move_at_every_step(
    folder: Path, quiet: list[list[int]], bytes_per_step: int, from_host: bool
) -> None:
    config = moving_config(folder, from_host)
    balancers: list[Restless] = []

    def new_balancer(group: LocalWorkerGroup) -> Restless:
        balancers.append(Restless(group, bytes_per_step, from_host))
        return balancers[0]

    with running_engine(config, 4, 16, new_balancer) as engine:
        group = engine._workers
        assert isinstance(group, LocalWorkerGroup)
        wanted = {
            (layer, expert): slot_bytes(group, rank, slot)
            for rank in range(NUM_RANKS)
            for layer, expert, slot in group.placement.hosted(rank)
        }
        assert len(set(wanted.values())) == 10, "two experts are equal: nothing would be noticed"
        for _ in range(2):
            assert generate(engine, PROMPTS, PARAMS) == quiet
        num_steps = engine.stats().num_steps
        check_slots(group, wanted)

    (balancer,) = balancers
    assert balancer.epochs == list(range(1, len(balancer.epochs) + 1))
    assert len(balancer.epochs) > num_steps / 10
    assert balancer.num_pieces > num_steps / 2
