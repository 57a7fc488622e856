"""A balancer for ranks that have started: planner, window, pools and costs put together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightmoe.balancer.loop import Balancer
from lightmoe.balancer.migration import Costs
from lightmoe.balancer.planner import plan
from lightmoe.balancer.window import LoadWindow
from lightmoe.core import RankInfo
from lightmoe.moe.placement import Placement


def start_balancer(
    ranks: Sequence[RankInfo],
    placement: Placement,
    *,
    interval_steps: int,
    bytes_per_step: int,
    num_free_slots: int,
    from_host: bool,
) -> Balancer:
    """A running Balancer; plans leave `num_free_slots` of every rank's pool empty."""
    num_slots = [rank.num_slots for rank in ranks]
    usable = [count - num_free_slots for count in num_slots]
    num_spares = placement.rank_kinds.count("spare")

    def plan_next(load: np.ndarray, now: Placement) -> Placement:
        return plan(load, usable, num_spares=num_spares, previous=now)

    return Balancer(
        plan_next,
        LoadWindow(placement.num_layers, placement.num_experts),
        num_slots,
        Costs(
            expert_bytes=max(rank.expert_bytes for rank in ranks),
            bytes_per_step=bytes_per_step,
            from_host=from_host,
        ),
        interval_steps,
    )
