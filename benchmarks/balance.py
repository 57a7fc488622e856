"""The balancer's bars that need no model and no GPU: plans against loads that drift and shift.

    python benchmarks/balance.py

Made-up traces: 20 steps with the weights 1 / i ** skew, a plan from them, then 200 steps whose
weights are multiplied by a new lognormal(0.5) each; `max_over_mean` is over the 200, ten ranks,
once a seed. Real routing: tests/data/routing-mixtral-lite.npz (record_routing.py), plans from past
steps only, over all steps, against the optimum on one placement planned from the whole trace.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import protocol

from lightmoe.balancer.planner import plan
from lightmoe.balancer.replay import ROUTES, Ranks, homes_and_spares, replay, spread_ranks
from lightmoe.balancer.synthetic import SyntheticRouting, synthetic_trace
from lightmoe.balancer.trace import RoutingTrace, read_trace
from lightmoe.balancer.window import LoadWindow

TRACE = Path(__file__).parent.parent / "tests" / "data" / "routing-mixtral-lite.npz"
NUM_RANKS, NUM_SPARES = 10, 2
PAIRS_PER_STEP = 8000
PLANNED_FROM = 20


def main() -> None:
    """Run every bar and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    rows = [*drifting(options.seeds, options.steps), *real_routing(), *planning_time(options.seeds)]
    for row in rows:
        print(row)
    protocol.write("balance", rows)


def drifting(num_seeds: int, num_steps: int) -> list[dict[str, Any]]:
    """Bars 1 to 3; one layer and four, one expert a token (the hardest) and several."""
    rows = []
    for num_experts, skew, slots, per_token, spare_bar, spread_bar in (
        (64, 1.0, 16, 8, {"must": 1.13, "aim": 1.10}, {"must": 1.08, "aim": 1.04}),
        (8, 0.6, 3, 2, {"must": 1.65, "aim": 1.5}, {}),
    ):
        for num_layers in (1, 4):
            shape = (num_layers, num_experts, NUM_RANKS)
            for num_per_token in (1, per_token):
                for placement, ranks, bar in (
                    ("spare", homes_and_spares(*shape, NUM_SPARES, slots), spare_bar),
                    ("spread", spread_ranks(*shape, NUM_SPARES * slots), spread_bar),
                ):
                    routing = SyntheticRouting(
                        num_steps=PLANNED_FROM + num_steps,
                        tokens_per_step=PAIRS_PER_STEP // num_per_token,
                        num_layers=num_layers,
                        num_experts=num_experts,
                        num_per_token=num_per_token,
                        skew=skew,
                        drift=0.5,
                        num_steady_steps=PLANNED_FROM,
                    )
                    rows.append(
                        {
                            "bar": f"{num_experts} experts, Zipf {skew}, drifting",
                            "placement": placement,
                            "replica_slots_per_layer": NUM_SPARES * slots,
                            "num_layers": num_layers,
                            "experts_per_token": num_per_token,
                            "seeds": f"0 to {num_seeds - 1}",
                            **bar,
                            "max_over_mean": drifted(routing, ranks, num_seeds),
                        }
                    )
    return rows


def drifted(routing: SyntheticRouting, ranks: Ranks, num_seeds: int) -> dict[str, Any]:
    """Each route's mean over the drifted steps and layers, spread over the seeds."""
    means: dict[str, list[float]] = {route: [] for route in ROUTES}
    for seed in range(num_seeds):
        trace = synthetic_trace(dataclasses.replace(routing, seed=seed))
        placement = plan(
            recent_load(trace, PLANNED_FROM), ranks.slots_per_rank, num_spares=ranks.num_spares
        )
        result = replay(trace, ranks, list(ROUTES), placement=placement)
        for route, of_seeds in means.items():
            of_seeds.append(float(result.max_over_mean(route)[PLANNED_FROM:].mean()))
    return {route: protocol.spread(of_seeds) for route, of_seeds in means.items()}


def recent_load(trace: RoutingTrace, num_steps: int) -> np.ndarray:
    """What a window holds after the first steps."""
    window = LoadWindow(trace.num_layers, trace.num_experts)
    for counts in trace.counts(0, num_steps):
        window.add(counts)
    return window.load()


def real_routing() -> list[dict[str, Any]]:
    """Bar 4, for several paces of planning."""
    trace = read_trace(TRACE)
    num_layers, num_experts = trace.num_layers, trace.num_experts
    ranks = homes_and_spares(num_layers, num_experts, NUM_RANKS, NUM_SPARES, 3)
    whole_load = trace.counts(0, trace.num_steps).sum(axis=0)
    whole = plan(whole_load, ranks.slots_per_rank, num_spares=NUM_SPARES)
    optimum = replay(trace, ranks, ["lp"], placement=whole).max_over_mean("lp").mean()
    rows = []
    for replan_every in (1, 4, 8, 16, 32):
        result = replay(trace, ranks, list(ROUTES), replan_every)
        means = {route: float(result.max_over_mean(route).mean()) for route in ROUTES}
        rows.append(
            {
                "bar": "real routing of mixtral-lite, against the LP on the whole trace's plan",
                "placement": "spare",
                "replica_slots_per_layer": NUM_SPARES * 3,
                "num_layers": num_layers,
                "replan_every": replan_every,
                "must": 1.05,
                "aim": 1.02,
                "over_optimum": means["waterfill"] / float(optimum),
                "optimum_max_over_mean": float(optimum),
                "max_over_mean": means,
                "moved_experts": sum(result.moved_copies),
            }
        )
    return rows


def planning_time(num_seeds: int) -> list[dict[str, Any]]:
    """64 layers of 128 experts on ten ranks, planned from nothing and from the plan before."""
    num_layers, num_experts = 64, 128
    rows = []
    for placement, ranks in (
        ("spare", homes_and_spares(num_layers, num_experts, NUM_RANKS, NUM_SPARES, 32)),
        ("spread", spread_ranks(num_layers, num_experts, NUM_RANKS, 64)),
    ):
        first_ms, next_ms = [], []
        for seed in range(num_seeds):
            generator = np.random.default_rng(seed)
            share = 1.0 / np.arange(1, num_experts + 1)
            load = 1e6 * np.stack([generator.permutation(share) for _ in range(num_layers)])
            drifted_load = load * np.exp(0.5 * generator.standard_normal(load.shape))
            started = time.perf_counter()
            before = plan(load, ranks.slots_per_rank, num_spares=ranks.num_spares)
            first_ms.append((time.perf_counter() - started) * 1e3)
            started = time.perf_counter()
            plan(drifted_load, ranks.slots_per_rank, num_spares=ranks.num_spares, previous=before)
            next_ms.append((time.perf_counter() - started) * 1e3)
        rows.append(
            {
                "bar": "planning time, 64 layers x 128 experts x 10 ranks",
                "placement": placement,
                "must_ms": 50,
                "first_ms": protocol.spread(first_ms),
                "next_ms": protocol.spread(next_ms),
            }
        )
    return rows


if __name__ == "__main__":
    main()
