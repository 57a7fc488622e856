"""A gate whose choice is made up, for benchmarks: K distinct experts a token, as skewed as asked.

What the model would have chosen is not computed, so the tokens that come out mean nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightmoe.kernels.checks import is_native
from lightmoe.moe.gate import Choice, Gate, PairSort

DRAW_BITS = 16
"""2^16 draws are made at the start; a token takes one of them."""

HASHED_COLUMNS = 64
"""So many values of a hidden state say which token it is."""


@dataclass(frozen=True, slots=True)
class RoutingSkew:
    """Experts drawn without replacement with weights 1 / i^exponent; 0 is uniform.

    Which expert is i = 1, 2, ... is permuted per layer by `seed`.
    """

    exponent: float
    seed: int = 0

    def instead_of(self, gate: Gate, layer: int) -> SkewGate:
        """The gate of this layer that draws where `gate` would have chosen."""
        return SkewGate(gate, layer, self)


class SkewGate(Gate):
    """Draws each token's experts by a hash of its hidden state: no host, no state, any device.

    The same hidden state gives the same experts in any batch, on any rank and in a CUDA graph, and
    equal bits of hidden states stay equal bits of answers. The hash is multilinear modulo 2^64 with
    multipliers of the layer's own, its highest bits taken (Lemire and Kaser, Strongly universal
    string hashing is fast). Every expert weighs `scale` / K, and groups of experts are ignored.
    """

    def __init__(self, gate: Gate, layer: int, skew: RoutingSkew) -> None:
        super().__init__(gate.router_weight, **gate.how)
        (num_experts, width), device = gate.router_weight.shape, gate.router_weight.device
        self._num_per_token: int = gate.how["num_experts_per_token"]
        self._weight: float = gate.how["scale"] / self._num_per_token
        self._draws = _draws_on(device, skew, num_experts, self._num_per_token)  # [2^16, K]
        random = np.random.default_rng((skew.seed, layer))
        order = torch.from_numpy(random.permutation(num_experts)).to(device)
        # The kernels take int32, the reference int64.
        self._orders = {True: order.int(), False: order}
        multipliers = random.integers(-(2**63), 2**63, min(width, HASHED_COLUMNS)) | 1
        self._multipliers = torch.from_numpy(multipliers).to(device)

    def __call__(self, hidden: Tensor, sort: PairSort | None = None) -> Choice:
        """[T, D] -> K experts for each token, in the order drawn."""
        draws = self._draws.index_select(0, self._hash(hidden))  # [T, K]
        experts = self._orders[is_native(hidden)].take(draws)
        shape = len(hidden), self._num_per_token
        weights = torch.full(shape, self._weight, dtype=torch.float32, device=hidden.device)
        return Choice(experts, weights, None if sort is None else sort(experts, weights))

    def ranking(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """All experts by their weight in the draw, the likeliest first; all score alike."""
        experts = self._orders[False].expand(len(hidden), -1)
        scores = torch.full_like(experts, 1 / self._num_per_token, dtype=torch.float32)
        return experts, scores

    def weigh(self, scores: Tensor) -> Tensor:
        """What is not dropped weighs as much as ever."""
        scale: float = self.how["scale"]
        return scores * scale

    def _hash(self, hidden: Tensor) -> Tensor:
        """int64 [T] below 2^DRAW_BITS."""
        bits = hidden[:, : len(self._multipliers)].view(
            torch.int32 if hidden.element_size() == 4 else torch.int16
        )
        mixed = (bits * self._multipliers).sum(dim=1)  # int64, modulo 2^64
        return (mixed >> (64 - DRAW_BITS)) + (1 << (DRAW_BITS - 1))


def draw_ranks(skew: RoutingSkew, num_experts: int, num_per_token: int) -> np.ndarray:
    """Rows of K distinct ranks i - 1 of the 2^DRAW_BITS draws, in the order drawn, int64.

    The K largest of log-weight plus Gumbel noise are a draw without replacement (Gumbel-max trick).
    """
    random = np.random.default_rng(skew.seed)
    log_weights = -skew.exponent * np.log(np.arange(1, num_experts + 1))
    keys = log_weights + random.gumbel(size=(1 << DRAW_BITS, num_experts))
    return np.argsort(-keys, axis=1)[:, :num_per_token]


@functools.lru_cache(maxsize=1)
def _draws_on(
    device: torch.device, skew: RoutingSkew, num_experts: int, num_per_token: int
) -> Tensor:
    """The draws, once for all layers."""
    return torch.from_numpy(draw_ranks(skew, num_experts, num_per_token).copy()).to(device)
