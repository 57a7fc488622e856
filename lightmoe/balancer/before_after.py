"""`lightmoe heatmap TRACE`: a recorded routing without replicas and with them, as one picture.

Before: one copy of each expert, homes spread evenly, spares idle. After: replicas by plans from
past steps only, each step's tokens water-filled over them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightmoe.balancer.batched_routes import home_loads, waterfill_loads
from lightmoe.balancer.planner import plan
from lightmoe.balancer.replay import replay_loads
from lightmoe.balancer.replay_command import ReplayOptions
from lightmoe.balancer.trace import RoutingTrace, read_trace
from lightmoe.errors import UsageError
from lightmoe.moe.placement import Placement
from lightmoe.telemetry.heatmap import LoadTable


def before_and_after(
    trace: RoutingTrace, options: ReplayOptions, name: str
) -> tuple[tuple[LoadTable, LoadTable], tuple[float, float]]:
    """The loads of both, and the fullest rank's over the mean one's, mean of steps and layers."""
    ranks = options.ranks(trace.num_layers, trace.num_experts)
    alike = np.ones((trace.num_layers, trace.num_experts))
    first = plan(alike, ranks.slots_per_rank, num_spares=ranks.num_spares)
    replayed = (
        replay_loads(trace, ranks, home_loads, placement=first),
        replay_loads(trace, ranks, waterfill_loads, options.replan_every),
    )
    tokens = trace.counts(0, trace.num_steps).sum(axis=0)
    before, after = (_table(name, tokens, loads, placement) for loads, placement in replayed)
    (low, _), (high, _) = replayed
    return (before, after), (_level(low), _level(high))


def save_before_and_after(path: Path, options: ReplayOptions, picture: Path) -> None:
    """Read the trace and write the picture, a .png; the model is named as the trace's file."""
    if picture.suffix.lower() != ".png":
        raise UsageError(f"{picture} ends in {picture.suffix or 'no suffix'}; give a .png")
    try:
        from lightmoe.telemetry.before_after_figure import draw_before_and_after
    except ModuleNotFoundError as error:
        raise UsageError(f"{picture} needs {error.name}; pip install 'lightmoe[plot]'") from None
    trace = read_trace(path)
    figure = draw_before_and_after(*before_and_after(trace, options, path.stem))
    try:
        figure.savefig(picture, format="png")
    except OSError as error:
        raise UsageError(f"{picture} cannot be written: {error.strerror or error}") from None


def _table(name: str, tokens: np.ndarray, loads: np.ndarray, placement: Placement) -> LoadTable:
    """`loads` int64 [S, L, W] as one table."""
    return LoadTable(
        model=name,
        expert_tokens=tokens,
        rank_pairs=loads.sum(axis=0).T,
        rank_kinds=placement.rank_kinds,
        placement=placement.copies,
        epoch=placement.epoch,
        num_steps=len(loads),
    )


def _level(loads: np.ndarray) -> float:
    """max/mean over ranks, mean of steps and layers; layers without tokens do not count."""
    means = loads.mean(axis=2)
    return float((loads.max(axis=2)[means > 0] / means[means > 0]).mean())
