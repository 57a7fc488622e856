"""Which of a source's own pairs leave a full rank, and where they go: what overflow.py decides.

Shapes: T tokens and K experts per token of this source, A tokens that have a pair on a full rank,
E experts, W ranks, C copies of an expert.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightmoe.moe.gate import Choice, Gate


class Relief:
    """The pairs of one source, in one layer.

    | field | meaning |
    |---|---|
    | experts int64 [T, K] | what runs, -1 where a pair was dropped |
    | weights fp32 [T, K] | of these, on the host |
    """

    def __init__(
        self,
        mode: Literal["redirect", "drop"],
        gate: Gate,
        hidden: Tensor,
        experts: np.ndarray,
        weights: Tensor,
    ) -> None:
        self.experts = experts.copy()
        self.weights = weights.cpu().numpy().copy()
        self._mode = mode
        self._gate = gate
        self._hidden = hidden
        self._before = (self.experts, self.weights)

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self._hidden.device

    def undo(self) -> None:
        """As it was before the last run."""
        self.experts, self.weights = self._before

    def choice_like(self, choice: Choice) -> Choice:
        """What runs, in the types and on the device of the gate's choice."""
        experts = torch.from_numpy(self.experts).to(choice.experts)
        return Choice(experts, torch.from_numpy(self.weights).to(choice.weights))

    def run(
        self,
        targets: np.ndarray,
        takers: np.ndarray,
        quota: np.ndarray,
        room: np.ndarray,
        rank: int,
    ) -> None:
        """Take up to `quota` [W] pairs from each rank, and bring up to `room` [W] to each.

        `targets` [T, K] is where each pair goes now, W for nowhere; `takers` [E, C] the ranks of
        each expert's copies, -1 for none; `rank` this source.
        """
        self._before = (self.experts.copy(), self.weights.copy())
        targets, quota, room = targets.copy(), np.append(quota, 0), np.append(room, 0)
        tokens = np.flatnonzero((quota[targets] > 0).any(axis=1))
        if not len(tokens):
            return
        if self._mode == "drop":
            self._drop(targets, quota)
        else:
            self._redirect(tokens, targets, quota, room, takers, rank)

    def _drop(self, targets: np.ndarray, quota: np.ndarray) -> None:
        """The lightest pairs go away, and their weight with them, but never a token's last."""
        while True:
            rows, columns = _in_turn(targets, quota, self.weights)
            several = (self.experts[rows] >= 0).sum(axis=1) > 1
            rows, columns = rows[several], columns[several]
            taken = _within(targets[rows, columns], quota) & _first_of_each(rows)
            if not taken.any():
                break
            rows, columns = rows[taken], columns[taken]
            self._move(rows, columns, np.array(-1), targets, quota)
            self.weights[rows, columns] = 0

    def _redirect(
        self,
        tokens: np.ndarray,
        targets: np.ndarray,
        quota: np.ndarray,
        room: np.ndarray,
        takers: np.ndarray,
        rank: int,
    ) -> None:
        """The lightest pairs go to the best expert with room on this rank, else anywhere."""
        best_first, scores = self._ranking(tokens)
        preference = np.empty_like(best_first)  # [A, E]: smaller is better
        np.put_along_axis(preference, best_first, np.arange(len(takers))[None], axis=1)
        place = np.zeros(len(targets), dtype=np.int64)
        place[tokens] = np.arange(len(tokens))
        while True:
            rows, columns = _in_turn(targets, quota, self.weights)
            goals, ranks = self._goals(rows, preference[place[rows]], takers, room, rank)
            possible = goals >= 0
            goals, ranks = goals[possible], ranks[possible]
            rows, columns = rows[possible], columns[possible]
            taken = _within(targets[rows, columns], quota) & _first_of_each(rows)
            taken[taken] = _within(ranks[taken], room)
            if not taken.any():
                break
            rows, columns, goals, ranks = (a[taken] for a in (rows, columns, goals, ranks))
            self._move(rows, columns, goals, targets, quota)
            np.subtract.at(room, ranks, 1)
        by_expert = np.empty_like(scores)
        np.put_along_axis(by_expert, best_first, scores, axis=1)
        changed = (self.experts[tokens] != self._before[0][tokens]).any(axis=1)
        self._weigh(tokens[changed], by_expert[changed])

    def _move(
        self,
        rows: np.ndarray,
        columns: np.ndarray,
        experts: np.ndarray,
        targets: np.ndarray,
        quota: np.ndarray,
    ) -> None:
        """These pairs leave their ranks, which counts, and stay where they come to in this run."""
        np.subtract.at(quota, targets[rows, columns], 1)
        self.experts[rows, columns] = experts
        targets[rows, columns] = len(quota) - 1

    def _weigh(self, rows: np.ndarray, scores: np.ndarray) -> None:
        """The weights of these tokens' experts, from the scores of all [A, E]."""
        chosen = np.take_along_axis(scores, self.experts[rows], axis=1)
        self.weights[rows] = self._gate.weigh(torch.from_numpy(chosen)).numpy()

    def _ranking(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = torch.from_numpy(tokens).to(self.device)
        best_first, scores = self._gate.ranking(self._hidden.index_select(0, index))
        return best_first.cpu().numpy(), scores.cpu().numpy()

    def _goals(
        self,
        rows: np.ndarray,
        preference: np.ndarray,
        takers: np.ndarray,
        room: np.ndarray,
        rank: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The expert that a pair of each of these tokens may go to, -1 for none, and its rank."""
        num_experts = len(takers)
        here = room[takers]  # -1, which is no rank, has none
        copy = np.where((takers == rank) & (here > 0), here.max(initial=0) + 1, here).argmax(axis=1)
        experts = np.arange(num_experts)
        taker, free = takers[experts, copy], here[experts, copy] > 0
        cost = preference + num_experts * (taker != rank)
        cost[:, ~free] = 2 * num_experts
        np.put_along_axis(cost, self.experts[rows], 2 * num_experts, axis=1)
        goals = cost.argmin(axis=1)
        goals[cost[np.arange(len(rows)), goals] == 2 * num_experts] = -1
        return goals, taker[goals]


def _in_turn(
    targets: np.ndarray, quota: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pairs on ranks with a quota, the lightest first."""
    rows, columns = np.nonzero(quota[targets] > 0)
    order = np.argsort(weights[rows, columns], kind="stable")
    return rows[order], columns[order]


def _first_of_each(rows: np.ndarray) -> np.ndarray:
    """True where a token comes for the first time: what its next pair may do, this one decides."""
    first = np.zeros(len(rows), dtype=bool)
    first[np.unique(rows, return_index=True)[1]] = True
    return first


def _within(ranks: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Whether each of these is among the first `most` [W] of its rank: bool, in their order."""
    order = np.argsort(ranks, kind="stable")
    in_order = ranks[order]
    place = np.empty_like(order)
    place[order] = np.arange(len(ranks)) - np.searchsorted(in_order, in_order)
    within: np.ndarray = place < most[ranks]
    return within
