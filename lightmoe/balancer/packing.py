"""Copies of experts onto ranks, all layers side by side: the largest first, each to the emptiest.

The pools hold all layers, so a layer may put one hot expert on a rank where another puts many cold
ones. When a pool runs full it is the coldest that must go elsewhere; `least` bounds how much one
layer may leave to the others.

Shapes: L layers, E experts, W ranks, N copies to place in a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Packing:
    """Who holds what so far; `place` goes on from there.

    | field | meaning |
    |---|---|
    | held bool [L, E, W] | the copies placed |
    | rank_load float64 [L, W] | what they carry: shares of a layer's load over the rank's speed |
    | left int64 [W] | free slots of each pool |
    | attraction float64 [L, E, W] | how much emptier that rank looks to that expert |
    | crowding float64 [W, W] | how much fuller a rank looks for each copy on another |
    | rank_speeds float64 [W] | relative |
    | homes int [L, E] | where replicas are placed: the experts' homes |
    | link_weight | how much of what links a home to a rank already counts as load there |
    | links float64 [L, W, W] | what replicas of this home's experts carry on that rank |
    """

    held: np.ndarray
    rank_load: np.ndarray
    left: np.ndarray
    attraction: np.ndarray
    crowding: np.ndarray
    rank_speeds: np.ndarray
    homes: np.ndarray | None = None
    link_weight: float = 0.0

    def __post_init__(self) -> None:
        num_layers, _, num_ranks = self.held.shape
        self.links = np.zeros((num_layers, num_ranks, num_ranks))
        self._owed = np.zeros((num_layers, num_ranks), dtype=np.int64)
        self._num_owed = np.zeros(num_ranks, dtype=np.int64)
        self._num_waiting = np.zeros(num_layers, dtype=np.int64)

    def place(
        self, experts: np.ndarray, loads: np.ndarray, least: np.ndarray | None = None
    ) -> np.ndarray:
        """Place experts int [L, N] (-1 for none), each with its load [L, N], in that order.

        Each rank gets `least` int [L, W] copies of a layer, none where it is missing; it sums to no
        more than N over the ranks and to no more than the pools over the layers. Returns the ranks
        int [L, N], -1 for a copy that found none: each rank was full or had that expert.
        """
        ranks = np.full(experts.shape, -1)
        if least is not None:
            self._owed, self._num_owed = least.copy(), least.sum(axis=0)
        self._num_waiting = (experts >= 0).sum(axis=1)
        for turn in range(experts.shape[1]):
            layers = np.flatnonzero(experts[:, turn] >= 0)
            while len(layers):
                expert = experts[layers, turn]
                cost = self._cost(layers, expert)
                rank = cost.argmin(axis=1)
                found = np.isfinite(cost[np.arange(len(layers)), rank])
                got = found & self._fits(layers, rank)
                placed, expert, rank = layers[got], expert[got], rank[got]
                self._put(placed, expert, rank, loads[placed, turn])
                ranks[placed, turn] = rank
                layers = layers[found & ~got]
        return ranks

    def _cost(self, layers: np.ndarray, experts: np.ndarray) -> np.ndarray:
        """How full each rank looks to one expert of each layer: [len(layers), W]."""
        held = self.held[layers, experts]
        cost: np.ndarray = self.rank_load[layers] - self.attraction[layers, experts]
        if self.homes is not None:
            cost += self.link_weight * self.links[layers, self.homes[layers, experts]]
        if self.crowding.any():
            cost += held @ self.crowding
        if self._num_owed.any():
            owed = self._owed[layers]
            is_bound = owed.sum(axis=1) >= self._num_waiting[layers]
            held = held | ((is_bound[:, None] | (self.left <= self._num_owed)) & (owed == 0))
        else:
            held = held | (self.left <= 0)
        cost[held] = np.inf
        return cost

    def _fits(self, layers: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Which find a slot on their rank if the first layers choose first: bool [len(layers)]."""
        unowed = self.left - self._num_owed
        if (np.bincount(rank, minlength=len(unowed)) <= unowed).all():
            return np.ones(len(layers), dtype=bool)
        is_owed = self._owed[layers, rank] > 0
        wants = (rank[:, None] == np.arange(len(unowed))) & ~is_owed[:, None]
        turn = np.take_along_axis(wants.cumsum(axis=0), rank[:, None], axis=1)[:, 0]
        return np.asarray(is_owed | (turn <= unowed[rank]))

    def _put(
        self, layers: np.ndarray, experts: np.ndarray, ranks: np.ndarray, loads: np.ndarray
    ) -> None:
        self.held[layers, experts, ranks] = True
        self.left -= np.bincount(ranks, minlength=len(self.left))
        self._num_waiting[layers] -= 1
        if self._num_owed.any():
            paid = np.minimum(self._owed[layers, ranks], 1)
            self._owed[layers, ranks] -= paid
            self._num_owed -= np.bincount(ranks, paid, len(self.left)).astype(np.int64)
        self.rank_load[layers, ranks] += loads / self.rank_speeds[ranks]
        if self.homes is not None:
            self.links[layers, self.homes[layers, experts], ranks] += loads


def fill_free_slots(held: np.ndarray, value: np.ndarray, left: np.ndarray) -> None:
    """Use up slots that no copy took: `left` int [W] of each rank, the most valuable [L, E] first.

    Changes `held` bool [L, E, W]. A rank takes no second copy of an expert.
    """
    for rank in np.flatnonzero(left > 0).tolist():
        worth = np.where(held[:, :, rank], -np.inf, value / held.sum(axis=2))
        order = np.argsort(-worth, axis=None, kind="stable")[: int(left[rank])]
        layers, experts = np.unravel_index(order, worth.shape)
        new = np.isfinite(worth[layers, experts])
        held[layers[new], experts[new], rank] = True


def in_order(times: np.ndarray, loads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Experts and their loads [L, N] for `Packing.place`: each `times` [L, E], largest load first.

    -1 behind the last of a layer that has fewer than N.
    """
    layers, experts = np.nonzero(times)
    repeats = times[layers, experts]
    layers, experts = np.repeat(layers, repeats), np.repeat(experts, repeats)
    order = np.lexsort((experts, -loads[layers, experts], layers))
    layers, experts = layers[order], experts[order]
    per_layer = np.bincount(layers, minlength=len(times))
    turns = np.arange(len(layers)) - np.repeat(per_layer.cumsum() - per_layer, per_layer)
    table = np.full((len(times), int(per_layer.max(initial=0))), -1)
    sorted_loads = np.zeros(table.shape)
    table[layers, turns] = experts
    sorted_loads[layers, turns] = loads[layers, experts]
    return table, sorted_loads
