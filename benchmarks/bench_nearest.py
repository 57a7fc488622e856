"""How many pairs leave their switch and their socket, by the way sources are matched with copies.

    python benchmarks/bench_nearest.py

The traces of balance.py on ten ranks, plans from 20 steps by the topology, then 30 steps by
waterfill; shares of the pairs whose expert has several copies. Loads are the same in all of them:
"by number" are sources and copies in rank order, "tree order" the same with ranks renumbered along
the tree, "nearest" the route's. "scrambled" machines number their ranks at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import protocol
from balance import NUM_RANKS, NUM_SPARES, PAIRS_PER_STEP, PLANNED_FROM, TRACE, recent_load

from lightmoe.balancer.planner import plan
from lightmoe.balancer.replay import Ranks, homes_and_spares, spread_ranks
from lightmoe.balancer.synthetic import SyntheticRouting, synthetic_trace
from lightmoe.balancer.trace import RoutingTrace, read_trace
from lightmoe.moe.route import NUM_SWEEPS, Nearness, Shares, assign, share_tokens
from lightmoe.topology import Node, Topology, read_topology

BOX = Path(__file__).parent.parent / "topology" / "10x2080ti-pcie.toml"
NUM_STEPS = 30
WAYS = ("by_number", "tree_order", "nearest")


def main() -> None:
    """Every machine with every trace and placement."""
    rows = [
        {"topology": name, "trace": trace_name, "placement": placement, **left}
        for name, topology in machines()
        for trace_name, trace, slots in traces()
        for placement, left in placements(topology, trace, slots)
    ]
    for row in rows:
        print(row)
    protocol.write("nearest", rows)


def machines() -> Iterator[tuple[str, Topology]]:
    """Two switches, and two of them on each socket; numbered along the tree or not."""
    box = read_topology(BOX)
    below = [f"switch{rank // 5}{'' if rank % 5 < 3 else 'b'}" for rank in range(NUM_RANKS)]
    more = {
        f"switch{one}b": Node(
            name=f"switch{one}b", kind="switch", parent=f"socket{one}", link="uplink"
        )
        for one in range(2)
    }
    ranks = tuple(replace(rank, parent=at) for rank, at in zip(box.ranks, below, strict=True))
    four = replace(box, nodes={**box.nodes, **more}, ranks=ranks)
    order = np.random.default_rng(7).permutation(NUM_RANKS)
    for name, machine in ((box.name, box), ("four switches", four)):
        yield name, machine
        scrambled = tuple(machine.ranks[rank] for rank in order)
        yield f"{name}, scrambled", replace(machine, ranks=scrambled)


def traces() -> Iterator[tuple[str, RoutingTrace, int]]:
    """Name, trace, slots of a spare and layer."""
    for num_experts, skew, slots, per_token in ((64, 1.0, 16, 8), (8, 0.6, 3, 2)):
        routing = SyntheticRouting(
            num_steps=PLANNED_FROM + NUM_STEPS,
            tokens_per_step=PAIRS_PER_STEP // per_token,
            num_layers=1,
            num_experts=num_experts,
            num_per_token=per_token,
            skew=skew,
            drift=0.5,
            num_steady_steps=PLANNED_FROM,
        )
        yield f"{num_experts} experts, Zipf {skew}, drifting", synthetic_trace(routing), slots
    yield "mixtral-lite", read_trace(TRACE), 3


def placements(
    topology: Topology, trace: RoutingTrace, slots: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Both layouts' shares of pairs that leave their group: {level: {way: share}}."""
    shape = (trace.num_layers, trace.num_experts, NUM_RANKS)
    spare = homes_and_spares(*shape, NUM_SPARES, slots)
    for name, ranks in (("spare", spare), ("spread", spread_ranks(*shape, NUM_SPARES * slots))):
        yield name, leaving(topology, trace, ranks)


def leaving(topology: Topology, trace: RoutingTrace, ranks: Ranks) -> dict[str, Any]:
    """Over all steps and layers."""
    load = recent_load(trace, PLANNED_FROM)
    nodes = topology.neighbourhoods()
    placement = plan(load, ranks.slots_per_rank, num_spares=ranks.num_spares, rank_nodes=nodes)
    nearness = topology.nearness()
    total = np.zeros((len(WAYS), len(nearness) + 1))
    for step in range(PLANNED_FROM, PLANNED_FROM + NUM_STEPS):
        for layer, copies in enumerate(placement.copies):
            total += left_groups(counts_of(trace, step, layer), copies, nearness)
    shares = total[:, :-1] / total[:, -1:]
    names = ("switch", "socket")[: len(nearness)]
    return {
        name: dict(zip(WAYS, shares[:, level].round(4).tolist(), strict=True))
        for level, name in enumerate(names)
    }


def counts_of(trace: RoutingTrace, step: int, layer: int) -> np.ndarray:
    """Pairs of each source rank and expert, [W, E]."""
    of_step = trace.step_ids == step
    experts = trace.experts[of_step, layer].astype(np.int64)
    counts = np.zeros((NUM_RANKS, trace.num_experts), dtype=np.int64)
    np.add.at(counts, (trace.source_ranks[of_step, None], experts), 1)
    return counts


def left_groups(
    counts: np.ndarray, copies: Sequence[Sequence[int]], nearness: Nearness
) -> np.ndarray:
    """Pairs that leave their group at each level, and all that had a choice: [ways, N + 1]."""
    shares = share_tokens(counts, copies, "waterfill", NUM_SWEEPS)
    ways = (
        assign(counts, copies, shares),
        assign_in_tree_order(counts, copies, shares, nearness),
        assign(counts, copies, shares, nearness),
    )
    found = np.zeros((len(ways), len(nearness) + 1))
    for expert, ranks in enumerate(copies):
        if len(ranks) == 1:
            continue
        for way, assigned in enumerate(ways):
            sent = assigned[:, expert, : len(ranks)]
            for level, groups in enumerate(np.array(nearness)):
                found[way, level] += sent[groups[:, None] != groups[list(ranks)]].sum()
            found[way, -1] += sent.sum()
    return found


def assign_in_tree_order(
    counts: np.ndarray, copies: Sequence[Sequence[int]], shares: Shares, nearness: Nearness
) -> np.ndarray:
    """`assign` without levels, as if ranks and copies stood along the tree."""
    order = sorted(range(NUM_RANKS), key=lambda rank: [groups[rank] for groups in nearness[::-1]])
    place = {rank: at for at, rank in enumerate(order)}
    by_place = [sorted(range(len(ranks)), key=lambda c, r=ranks: place[r[c]]) for ranks in copies]
    assigned = assign(
        counts[order],
        [[place[ranks[c]] for c in at] for ranks, at in zip(copies, by_place, strict=True)],
        [[share[c] for c in at] for share, at in zip(shares, by_place, strict=True)],
    )
    found = np.zeros_like(assigned)
    for expert, at in enumerate(by_place):
        found[np.ix_(order, [expert], at)] = assigned[:, [expert], : len(at)]
    return found


if __name__ == "__main__":
    main()
