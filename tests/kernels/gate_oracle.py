"""The gate and the sort in plain Python and float64: what both roads are held against."""

from __future__ import annotations

import math
from collections.abc import Sequence


def sigmoid(value: float) -> float:
    if value < 0:
        return math.exp(max(value, -700.0)) / (1.0 + math.exp(max(value, -700.0)))
    return 1.0 / (1.0 + math.exp(-value))


def gate_row(
    logits: Sequence[float],
    num_chosen: int,
    *,
    renormalize: bool,
    scale: float = 1.0,
    num_groups: int = 1,
    num_groups_per_token: int = 1,
    scoring: str = "softmax",
    bias: Sequence[float] | None = None,
) -> tuple[list[int], list[float]]:
    """Experts and weights of one token."""
    logits = [-math.inf if math.isnan(value) else value for value in logits]
    num_experts = len(logits)
    if scoring == "softmax":
        top = max(logits)
        parts = [1.0 if value == top else math.exp(value - top) for value in logits]
        scores = [part / math.fsum(parts) for part in parts]
        candidates = logits
    else:
        scores = [sigmoid(value) for value in logits]
        candidates = [a + b for a, b in zip(scores, bias or [0.0] * num_experts, strict=True)]
    size = num_experts // num_groups
    groups = [sorted(candidates[g * size : (g + 1) * size])[::-1] for g in range(num_groups)]
    quality = [sum(group[: 1 if scoring == "softmax" else 2]) for group in groups]
    kept = sorted(range(num_groups), key=lambda g: (-quality[g], g))[:num_groups_per_token]
    taking_part = [e for e in range(num_experts) if e // size in kept]
    experts = sorted(taking_part, key=lambda e: (-candidates[e], e))[:num_chosen]
    weights = [scores[e] for e in experts]
    if renormalize:
        total = math.fsum(weights) + 1e-20
        weights = [weight / total for weight in weights]
    return experts, [scale * weight for weight in weights]


def sorted_pairs(experts: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """(expert, token, k) of every pair in the order that sort_pairs gives them."""
    return sorted((e, t, k) for t, row in enumerate(experts) for k, e in enumerate(row))
