"""`--overflow`: a rank that gets too many pairs of a step loses some, before any row leaves.

All ranks count what each of them chose, and so know the load of every rank under the step's route.
What is above the capacity is shared among those who send it, in proportion to what they send, and
so is the room below it: then each source decides alone about its own pairs, the lightest first.

Shapes: T tokens and K experts per token of one source, E experts, W ranks, C copies of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightmoe.core import OverflowRule, StepOverflow
from lightmoe.distributed.communicator import Communicator
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.moe.gate import Choice, Gate
from lightmoe.moe.relief import Relief
from lightmoe.moe.route import Nearness, copy_of_each, copy_rank_table, split_over_copies
from lightmoe.telemetry.trace import span


@dataclass(frozen=True, slots=True)
class Flow:
    """What a route makes of the counts [W, E]: the same on every rank.

    | field | meaning |
    |---|---|
    | assigned [W, E, C] | pairs of each source that each copy gets |
    | holders [E, C] | the rank of each copy, -1 for none |
    | pairs [W, W] | how many from each source to each rank |
    """

    assigned: np.ndarray
    holders: np.ndarray
    pairs: np.ndarray

    @classmethod
    def of(
        cls, counts: np.ndarray, copies: Sequence[Sequence[int]], route: str, nearness: Nearness
    ) -> Flow:
        """Route the counts."""
        assigned = split_over_copies(counts, copies, route, nearness=nearness)
        holders = copy_rank_table(copies)
        num_ranks = len(counts)
        pairs = np.zeros((num_ranks, num_ranks + 1), dtype=np.int64)  # -1 is the last, of zeros
        np.add.at(pairs, (np.arange(num_ranks)[:, None, None], holders), assigned)
        return cls(assigned, holders, pairs[:, :num_ranks])

    def targets(self, experts: np.ndarray, source: int) -> np.ndarray:
        """The rank of each pair of one source, W for none: [T, K] -> [T, K]."""
        targets = np.full(experts.shape, len(self.pairs))
        chosen = experts >= 0
        key = experts[chosen]
        targets[chosen] = self.holders[key, copy_of_each(key, self.assigned[source])]
        return targets

    def takers(self, route: str) -> np.ndarray:
        """The ranks that get more if an expert does, [E, C]: its home where no copy is used."""
        return self.holders[:, :1] if route == "none" else self.holders


def capacity_of(num_pairs: int, num_ranks: int, factor: float) -> int:
    """The most pairs that a rank should get: `factor` x the mean, rounded up."""
    return math.ceil(factor * num_pairs / num_ranks - 1e-9)  # 1.1 x 10 is 11, not 12


def shares_of_excess(pairs: np.ndarray, capacity: int) -> np.ndarray:
    """How many of its pairs each source is to take from each rank: [W, W] -> [W, W]."""
    load = pairs.sum(axis=0)
    excess = (load - capacity).clip(min=0)
    shares, rest = np.divmod(pairs * excess, load.clip(min=1))
    missing = excess - shares.sum(axis=0)
    # Largest remainders first, ties to the first source: never more than it sends.
    place = np.argsort(np.argsort(-rest, axis=0, kind="stable"), axis=0)
    result: np.ndarray = shares + (place < missing)
    return result


def shares_of_room(pairs: np.ndarray, capacity: int, wanted: np.ndarray) -> np.ndarray:
    """How many pairs each source may bring to each rank: [W, W], from what each has to place [W].

    Each gets room for all of its own where there is enough for all.
    """
    room = (capacity - pairs.sum(axis=0)).clip(min=0)
    shares: np.ndarray = wanted[:, None] * room // max(1, int(wanted.sum()))
    missing = wanted - shares.sum(axis=1)
    for rank, left in enumerate((room - shares.sum(axis=0)).tolist()):
        for _ in range(left):
            source = int(missing.argmax())
            shares[source, rank] += 1
            missing[source] -= 1
    return shares


class Overflow:
    """Stands between the gates of a rank's layers and its dispatchers. Waits for the device.

    Nothing changes where no rank passes the capacity. A token keeps at least one expert, and its
    experts are distinct. A redirected pair weighs by the new expert's own score, renormalised with
    the token's others as the gate does it. A dropped pair takes its weight along, as in GShard
    (Lepikhin et al. 2020): renormalised, it cost mixtral-lite less where little was dropped, and
    more where much was, which is what this is for.
    """

    def __init__(self, rule: OverflowRule, group: ExpertGroup, communicator: Communicator) -> None:
        self._rule = rule
        self._group = group
        self._communicator = communicator
        self._moved: dict[int, np.ndarray] = {}
        self._num_layers = self._num_left = 0

    def take(self) -> StepOverflow:
        """What was done since last asked: of the tokens of the step, both halves' in order."""
        moved = [self._moved[half] for half in sorted(self._moved)]
        parts = np.concatenate(moved) if moved else np.zeros(0, dtype=np.int32)
        step = StepOverflow(parts, self._num_layers, self._num_left)
        self._moved, self._num_layers, self._num_left = {}, 0, 0
        return step

    def __call__(
        self, layer: int, gate: Gate, hidden: Tensor, choice: Choice, half: int = 0
    ) -> Choice:
        """The choice [T, K] that is to run, of a layer's hidden states [T, D] and their gate's."""
        with span("overflow", layer):
            experts = choice.experts.cpu().numpy().astype(np.int64)
            relief = Relief(self._rule.mode, gate, hidden, experts, choice.weights)
            passed, left = self._relieve(layer, relief)
        moved = (relief.experts != experts).sum(axis=1, dtype=np.int32)
        self._moved[half] = moved + self._moved.get(half, 0)
        self._num_layers += passed
        self._num_left += left
        return relief.choice_like(choice) if moved.any() else choice

    def _relieve(self, layer: int, relief: Relief) -> tuple[bool, int]:
        """Take pairs from full ranks while that helps; whether there were any, and what is left.

        More than one round is needed where copies change who gets what.
        """
        group = self._group
        copies = group.tables_on(relief.device).copies[layer]
        capacity, before, passed = 0, 0, False
        while True:
            counts = self._count(relief.experts, len(copies))
            flow = Flow.of(counts, copies, group.route, group.nearness)
            capacity = capacity or capacity_of(
                int(counts.sum()), len(counts), self._rule.capacity_factor
            )
            excess = int((flow.pairs.sum(axis=0) - capacity).clip(min=0).sum())
            if passed and excess >= before:
                relief.undo()
                return True, before
            if not excess:
                return passed, 0
            before, passed = excess, True
            quota = shares_of_excess(flow.pairs, capacity)
            relief.run(
                flow.targets(relief.experts, group.rank),
                flow.takers(group.route),
                quota[group.rank],
                shares_of_room(flow.pairs, capacity, quota.sum(axis=1))[group.rank],
                group.rank,
            )

    def _count(self, experts: np.ndarray, num_experts: int) -> np.ndarray:
        """The pairs of every source and expert: int64 [W, E]."""
        num_ranks = self._communicator.num_ranks
        mine = torch.from_numpy(np.bincount(experts[experts >= 0], minlength=num_experts))
        counts = torch.empty(num_ranks, num_experts, dtype=torch.int64)
        ones = [1] * num_ranks
        with span("collective"):
            self._communicator.all_to_all(counts, mine.repeat(num_ranks, 1), ones, ones)
        return counts.numpy()
