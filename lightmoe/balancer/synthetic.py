"""Made-up routing traces from a seed: skewed choices that drift, and shift once.

Shapes: T tokens, L layers, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightmoe.balancer.trace import RoutingTrace

MAX_CELLS = 1 << 24
"""Tokens x layers x experts drawn at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticRouting:
    """What to draw.

    Expert i of a layer, in an order of the layer's own, has the weight 1 / i ** skew; a token draws
    its experts one after the other, by weight, without those it has. For `num_steady_steps` the
    weights stay; then each `steps_per_drift` steps every weight is multiplied by a new
    exp(drift * normal). With `domain_shift` the second half of the steps has another order.
    """

    num_steps: int
    tokens_per_step: int
    num_layers: int
    num_experts: int
    num_per_token: int
    num_ranks: int = 10
    skew: float = 1.0
    drift: float = 0.0
    num_steady_steps: int = 0
    steps_per_drift: int = 1
    domain_shift: bool = False
    seed: int = 0


def synthetic_trace(routing: SyntheticRouting) -> RoutingTrace:
    """The same trace for the same fields."""
    generator = np.random.default_rng(routing.seed)
    experts = np.concatenate(
        [_draw(generator, routing, weights) for weights in _weights_of_steps(generator, routing)]
    )
    tokens = np.arange(routing.tokens_per_step) * routing.num_ranks // routing.tokens_per_step
    return RoutingTrace(
        experts=experts,
        step_ids=np.repeat(np.arange(routing.num_steps), routing.tokens_per_step).astype(np.int32),
        source_ranks=np.tile(tokens, routing.num_steps).astype(np.int16),
        num_experts=routing.num_experts,
    )


def _weights_of_steps(
    generator: np.random.Generator, routing: SyntheticRouting
) -> list[np.ndarray]:
    """The weights [L, E] of every step."""
    base = _popularity(generator, routing)
    shifts_at = (routing.num_steps + 1) // 2 if routing.domain_shift else routing.num_steps
    drift = np.ones_like(base)
    weights = []
    for step in range(routing.num_steps):
        if step == shifts_at:
            base = _popularity(generator, routing)
        drifting = step - routing.num_steady_steps
        if drifting >= 0 and drifting % routing.steps_per_drift == 0:
            drift = np.exp(routing.drift * generator.standard_normal(base.shape))
        weights.append(base * drift)
    return weights


def _popularity(generator: np.random.Generator, routing: SyntheticRouting) -> np.ndarray:
    share = 1.0 / np.arange(1, routing.num_experts + 1) ** routing.skew
    return np.stack([generator.permutation(share) for _ in range(routing.num_layers)])


def _draw(
    generator: np.random.Generator, routing: SyntheticRouting, weights: np.ndarray
) -> np.ndarray:
    """The choices of one step: uint16 [T, L, K].

    The K largest of log(weight) + Gumbel noise are K draws without replacement (Efraimidis and
    Spirakis 2006, in logarithms).
    """
    block = max(1, MAX_CELLS // weights.size)
    parts = []
    for begin in range(0, routing.tokens_per_step, block):
        num_tokens = min(block, routing.tokens_per_step - begin)
        keys = np.log(weights) + generator.gumbel(size=(num_tokens, *weights.shape))
        order = np.argsort(-keys, axis=2)[:, :, : routing.num_per_token]
        parts.append(order.astype(np.uint16))
    return np.concatenate(parts)
