"""One route of one layer on a CPU rank: from the counts of all ranks to what goes where.

    python benchmarks/bench_route.py [--experts 8 64 128] [--samples 200]

`compiled` is cute_kernels/cpu/route.cpp as the installation built it, `reference` the Python that
runs where there was no compiler. Both are called as dispatchers call them, by the placement's
copies; six sweeps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import protocol
from kernels.route_problem import NUM_SPARES, RouteProblem

from lightmoe.errors import MachineError
from lightmoe.kernels import host_route
from lightmoe.kernels.route_reference import NUM_SWEEPS, ROUTES, assign, share_tokens
from lightmoe.moe.route import split_over_copies

NUM_REPLICAS = {8: 6, 64: 32, 128: 64}
PAIRS_PER_RANK = 8192
NUM_PROBLEMS = 10


def reference(problem: RouteProblem, route: str) -> np.ndarray:
    """What runs without a compiler."""
    shares = share_tokens(problem.counts, problem.copies, route, NUM_SWEEPS)
    return assign(problem.counts, problem.copies, shares)


def compiled(problem: RouteProblem, route: str) -> np.ndarray:
    """What runs with one."""
    return split_over_copies(problem.counts, problem.copies, route)


def microseconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def measure(num_experts: int, layout: str, route: str, num_samples: int) -> list[dict[str, Any]]:
    """Both versions on the same problems; their answers have to be the same."""
    problems = [
        RouteProblem.random(seed, layout, num_experts, NUM_REPLICAS[num_experts], PAIRS_PER_RANK)
        for seed in range(NUM_PROBLEMS)
    ]
    wanted = [reference(problem, route) for problem in problems]
    balance = np.mean([p.max_over_mean(a) for p, a in zip(problems, wanted, strict=True)])
    rows = []
    for version in (reference, compiled):
        found = [version(problem, route) for problem in problems]
        correct = all((a == b).all() for a, b in zip(found, wanted, strict=True))
        samples = [
            microseconds(lambda version=version, i=i: version(problems[i % NUM_PROBLEMS], route))
            for i in range(num_samples)
        ]
        rows.append(
            {
                "version": version.__name__,
                "experts": num_experts,
                "replica_slots": NUM_REPLICAS[num_experts],
                "ranks": layout,
                "route": route,
                "sweeps": NUM_SWEEPS,
                "microseconds": protocol.spread(samples),
                "max_over_mean": float(balance),
                "correct": correct,
            }
        )
    return rows


def main() -> int:
    """Measure, print and write; 1 where the versions differ."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 64, 128])
    parser.add_argument("--samples", type=int, default=200)
    arguments = parser.parse_args()
    if host_route.library_path() is None:
        raise MachineError(f"no compiled route here; {host_route.REMEDY}")
    rows = []
    for num_experts in arguments.experts:
        for layout in NUM_SPARES:
            for route in ROUTES:
                for row in measure(num_experts, layout, route, arguments.samples):
                    rows.append(row)
                    took = row["microseconds"]
                    print(
                        f"{num_experts:4} experts on {layout:4}{route:10}{row['version']:10}"
                        f"{took['median']:8.0f} us [{took['min']:.0f} {took['max']:.0f}]"
                        f"{'' if row['correct'] else ' WRONG'}",
                        flush=True,
                    )
    protocol.write("route", rows)
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
