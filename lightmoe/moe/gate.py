"""The router of one layer: which experts each token goes to, and with what weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.kernels import PairGroups


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """The pairs of a choice where all of them stay here.

    groups: one an expert; pair_row int32 [P] the token of each sorted pair; pair_index int32 [T, K]
    where each pair went; pair_weight fp32 [P] the weight of each sorted pair, where asked for.
    """

    groups: PairGroups
    pair_row: Tensor
    pair_index: Tensor
    pair_weight: Tensor | None


@dataclass(frozen=True, slots=True)
class PairSort:
    """How to sort: the slot of each expert, int32 [E], and how many of P pairs make a tile.

    `weighted` asks for the weights in the order of the pairs.
    """

    slots: Tensor
    tokens_per_tile: Callable[[int], int]
    weighted: bool

    def __call__(self, experts: Tensor, weights: Tensor) -> SortedPairs:
        """Sort the pairs of experts [T, K] and weights [T, K]."""
        pair_weight = self.room(experts.shape)
        groups, pair_row, pair_index = kernels.sort_pairs(
            experts,
            len(self.slots),
            self.slots,
            self.tokens_per_tile(experts.numel()),
            weights=None if pair_weight is None else weights,
            pair_weight=pair_weight,
        )
        return SortedPairs(groups, pair_row, pair_index, pair_weight)

    def room(self, shape: Sequence[int]) -> Tensor | None:
        """Where the weights of T x K pairs will be, if they are asked for."""
        if not self.weighted:
            return None
        return torch.empty(math.prod(shape), dtype=torch.float32, device=self.slots.device)


@dataclass(frozen=True, slots=True)
class Choice:
    """experts [T, K], best first; weights fp32 [T, K]; the pairs where the gate has sorted them.

    Expert -1, of weight 0, is none: that pair was dropped. Every token keeps one. `guessed` [T, K]
    are the experts that the tokens may choose in the next layer, where one asks.
    """

    experts: Tensor
    weights: Tensor
    pairs: SortedPairs | None = None
    guessed: Tensor | None = None

    @property
    def with_guess(self) -> Tensor:
        """experts, and where there are any also the guessed ones: [T, K] or [T, 2 K]."""
        if self.guessed is None:
            return self.experts
        return torch.cat((self.experts, self.guessed), dim=1)


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
        deterministic: bool = True,
    ) -> None:
        self.router_weight = router_weight
        self.how: dict[str, Any] = {
            "num_experts_per_token": num_experts_per_token,
            "renormalize": renormalize,
            "scale": scale,
            "num_groups": num_groups,
            "num_groups_per_token": num_groups_per_token,
            "deterministic": deterministic,
        }

    def ranking(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[A, D] -> every expert [A, E], best first, and its score, as `weigh` takes it: fp32."""
        router = self.router_weight
        logits = kernels.matmul(hidden.to(router.dtype), router, output_float32=True)
        return kernels.reference.topk_gate(
            None,
            None,
            len(router),
            logits=logits,
            renormalize=False,
            num_groups=self.how["num_groups"],
            num_groups_per_token=self.how["num_groups_per_token"],
        )

    def weigh(self, scores: Tensor) -> Tensor:
        """The weights of a token's experts from their scores [A, K], as the gate makes them."""
        if self.how["renormalize"]:
            scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        scale: float = self.how["scale"]
        return scores * scale

    def __call__(self, hidden: Tensor, sort: PairSort | None = None) -> Choice:
        """[T, D] -> the choice of each token; with `sort` also the sorted pairs, in one launch."""
        if sort is None:
            return Choice(*kernels.topk_gate(hidden, self.router_weight, **self.how))
        shape = (len(hidden), self.how["num_experts_per_token"])
        pair_weight = sort.room(shape)
        experts, weights, groups, pair_row, pair_index = kernels.route_tokens(
            hidden,
            self.router_weight,
            slots=sort.slots,
            tokens_per_tile=sort.tokens_per_tile(math.prod(shape)),
            pair_weight=pair_weight,
            **self.how,
        )
        return Choice(experts, weights, SortedPairs(groups, pair_row, pair_index, pair_weight))
