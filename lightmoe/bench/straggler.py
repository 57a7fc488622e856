"""Who is waited for: the rank and layer furthest above the mean load, and the expert behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lightmoe.core import LoadReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """In `layer`, `rank` computed `rank_over_mean` times the pairs of the mean rank.

    `expert` is the one that gave it most; `expert_over_mean` is its tokens over the layer's mean.
    """

    rank: int
    kind: str
    layer: int
    rank_over_mean: float
    expert: int
    expert_over_mean: float

    def __str__(self) -> str:
        """rank, layer (expert), and how far above the mean they are."""
        spare = " (spare)" if self.kind == "spare" else ""
        return (
            f"rank {self.rank}{spare}, layer {self.layer}: {self.rank_over_mean:.2f}x\n"
            f"(expert {self.expert}: {self.expert_over_mean:.2f}x)"
        )


def load_between(before: LoadReport, after: LoadReport) -> LoadReport:
    """What was counted from one report to a later one, on the later one's placement."""
    seconds = zip(before.rank_seconds, after.rank_seconds, strict=True)
    return replace(
        after,
        expert_tokens=after.expert_tokens - before.expert_tokens,
        rank_pairs=after.rank_pairs - before.rank_pairs,
        num_steps=after.num_steps - before.num_steps,
        rank_seconds=[late - early for early, late in seconds],
    )


def find_straggler(load: LoadReport) -> Straggler | None:
    """The worst rank and layer of a load; None where no pair was computed.

    An expert's tokens count in equal parts for the ranks that hold it, all for its home where the
    route is "none": the real split is not in the report.
    """
    ratios = rank_ratios(load)
    if not load.rank_pairs.any():
        return None
    rank, layer = (int(place) for place in np.unravel_index(ratios.argmax(), ratios.shape))
    tokens = load.expert_tokens[layer]
    holders = [ranks[:1] if load.route == "none" else ranks for ranks in load.placement[layer]]
    parts = [
        tokens[expert] / len(ranks) if rank in ranks else -1.0
        for expert, ranks in enumerate(holders)
    ]
    expert = int(np.argmax(parts))
    return Straggler(
        rank=rank,
        kind=load.rank_kinds[rank],
        layer=layer,
        rank_over_mean=float(ratios[rank, layer]),
        expert=expert,
        expert_over_mean=float(tokens[expert] / max(tokens.mean(), 1e-9)),
    )


def rank_ratios(load: LoadReport) -> np.ndarray:
    """Pairs of a rank over the layer's mean of all ranks, [W, L]; 1 in layers without pairs."""
    means = load.rank_pairs.mean(axis=0, keepdims=True)
    ratios = np.ones(load.rank_pairs.shape)
    np.divide(load.rank_pairs, means, out=ratios, where=means > 0)
    return ratios


def max_over_mean(load: LoadReport) -> float:
    """The fullest rank over the mean rank, mean over layers; 1 is level."""
    return float(rank_ratios(load).max(axis=0).mean())
