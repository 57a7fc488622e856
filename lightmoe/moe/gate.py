"""The router of one layer: which experts each token goes to, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightmoe import kernels


@dataclass(frozen=True, slots=True)
class Choice:
    """experts int64 [T, K], best first; weights fp32 [T, K]."""

    experts: Tensor
    weights: Tensor


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
        self._router_weight = router_weight
        self._num_experts_per_token = num_experts_per_token
        self._renormalize = renormalize
        self._scale = scale
        self._num_groups = num_groups
        self._num_groups_per_token = num_groups_per_token

    def __call__(self, hidden: Tensor) -> Choice:
        """[T, D] -> the choice of each token."""
        experts, weights = kernels.topk_gate(
            hidden,
            self._router_weight,
            self._num_experts_per_token,
            renormalize=self._renormalize,
            scale=self._scale,
            num_groups=self._num_groups,
            num_groups_per_token=self._num_groups_per_token,
        )
        return Choice(experts, weights)
