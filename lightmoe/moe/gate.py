"""The router of one layer: which experts each token goes to, and with what weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightmoe import kernels
from lightmoe.kernels import PairGroups


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """The pairs of a choice where all of them stay here.

    groups: one an expert; pair_row int32 [P] the token of each sorted pair; pair_index int32 [T, K]
    where each pair went.
    """

    groups: PairGroups
    pair_row: Tensor
    pair_index: Tensor


@dataclass(frozen=True, slots=True)
class PairSort:
    """How to sort: the slot of each expert, int32 [E], and how many pairs make a tile of P."""

    slots: Tensor
    tokens_per_tile: Callable[[int], int]

    def __call__(self, experts: Tensor) -> SortedPairs:
        """Sort the pairs of experts [T, K]."""
        tokens = self.tokens_per_tile(experts.numel())
        return SortedPairs(*kernels.sort_pairs(experts, len(self.slots), self.slots, tokens))


@dataclass(frozen=True, slots=True)
class Choice:
    """experts [T, K], best first; weights fp32 [T, K]; the pairs where the gate has sorted them."""

    experts: Tensor
    weights: Tensor
    pairs: SortedPairs | None = None


class Gate:
    """Softmax scores, top-k, from the best groups of experts only where the model has groups."""

    def __init__(
        self,
        router_weight: Tensor,
        num_experts_per_token: int,
        *,
        renormalize: bool,
        scale: float = 1.0,
        num_groups: int = 1,
        num_groups_per_token: int = 1,
    ) -> None:
        self.router_weight = router_weight
        self.how: dict[str, Any] = {
            "num_experts_per_token": num_experts_per_token,
            "renormalize": renormalize,
            "scale": scale,
            "num_groups": num_groups,
            "num_groups_per_token": num_groups_per_token,
        }

    def __call__(self, hidden: Tensor, sort: PairSort | None = None) -> Choice:
        """[T, D] -> the choice of each token; with `sort` also the sorted pairs, in one launch."""
        if sort is None:
            return Choice(*kernels.topk_gate(hidden, self.router_weight, **self.how))
        num_pairs = len(hidden) * self.how["num_experts_per_token"]
        experts, weights, groups, pair_row, pair_index = kernels.route_tokens(
            hidden,
            self.router_weight,
            slots=sort.slots,
            tokens_per_tile=sort.tokens_per_tile(num_pairs),
            **self.how,
        )
        return Choice(experts, weights, SortedPairs(groups, pair_row, pair_index))
