"""A balancer for ranks that have started: planner, window, pools and costs put together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from lightmoe.balancer.loop import Balancer
from lightmoe.balancer.migration import Costs
from lightmoe.balancer.planner import plan
from lightmoe.balancer.window import LoadWindow
from lightmoe.core import RankInfo
from lightmoe.moe.placement import Placement
from lightmoe.topology import Topology


def start_balancer(
    ranks: Sequence[RankInfo],
    placement: Placement,
    *,
    interval_steps: int,
    bytes_per_step: int,
    num_free_slots: int,
    from_host: bool,
    topology: Topology | None = None,
) -> Balancer:
    """A running Balancer; plans leave `num_free_slots` of every rank's pool empty.

    By the topology replicas are spread over neighbourhoods, and faster ranks carry more.
    """
    num_slots = [rank.num_slots for rank in ranks]
    usable = [count - num_free_slots for count in num_slots]
    num_spares = placement.rank_kinds.count("spare")

    speeds = None if topology is None else rank_speeds(topology)
    nodes = None if topology is None else topology.neighbourhoods()

    def plan_next(load: np.ndarray, now: Placement) -> Placement:
        return plan(
            load,
            usable,
            num_spares=num_spares,
            previous=now,
            rank_speeds=speeds,
            rank_nodes=nodes,
        )

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
        rank_speeds=speeds,
    )


def rank_speeds(topology: Topology) -> tuple[float, ...]:
    """What each rank's device reaches in products [W], over the mean rank's.

    The seconds of a step do not tell it: in each layer every rank waits for the slowest.
    """
    ranks = range(topology.num_ranks)
    reached = [topology.device(rank).reached_flops_per_second for rank in ranks]
    mean = statistics.fmean(reached)
    return tuple(flops / mean for flops in reached)
