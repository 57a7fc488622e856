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
    """Softmax scores, top-k."""

    def __init__(
        self,
        router_weight: Tensor,
        num_experts_per_token: int,
        *,
        renormalize: bool,
        scale: float = 1.0,
    ) -> None:
        self._router_weight = router_weight
        self._num_experts_per_token = num_experts_per_token
        self._renormalize = renormalize
        self._scale = scale

    def __call__(self, hidden: Tensor) -> Choice:
        """[T, D] -> the choice of each token."""
        experts, weights = kernels.topk_gate(
            hidden,
            self._router_weight,
            self._num_experts_per_token,
            renormalize=self._renormalize,
            scale=self._scale,
        )
        return Choice(experts, weights)
