"""The route of one layer on the device: from the counts of all ranks to what goes where.

    python benchmarks/kernels/route.py [--shapes qwen3] [--tokens 1024]

Ten ranks, six sweeps, one replica slot for every two experts, on two spares (8+2) or spread over
all ranks (10); load by Zipf 1.0, drifted since the plan. T counts tokens of each rank. "switches":
by the nearness of four switches on two sockets.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import numpy as np
import torch
from ceilings import Ceilings
from floors import Shape
from route_problem import NUM_SPARES, RouteProblem
from row_stems import Measurement, run
from torch import Tensor

from lightmoe.kernels import RouteSplit, route_reference
from lightmoe.kernels.route import ROUTE_NUMBERS, route_split

TOKENS_PER_TILE = 64
NUM_PROBLEMS = 8
SWITCHES = ((0, 0, 0, 3, 3, 5, 5, 5, 8, 8), (0, 0, 0, 0, 0, 5, 5, 5, 5, 5))


def measure(shape: Shape, tokens: int, measured: Ceilings) -> Iterator[Measurement]:
    """Every route on both layouts; an error of 1 is any integer that is not the reference's."""
    num_experts = shape.num_experts
    pairs_per_rank = tokens * shape.num_experts_per_token
    for layout in NUM_SPARES:
        problems = [
            RouteProblem.random(seed, layout, num_experts, num_experts // 2, pairs_per_rank)
            for seed in range(NUM_PROBLEMS)
        ]
        inputs = [arguments_of(problem) for problem in problems]
        switches = torch.tensor(SWITCHES, dtype=torch.int32)
        cases = [(route, route, None) for route in ROUTE_NUMBERS]
        for name, route, nearness in [*cases, ("waterfill, switches", "waterfill", switches)]:
            calls = [
                functools.partial(
                    route_split,
                    *(tensor.cuda() for tensor in tensors),
                    TOKENS_PER_TILE,
                    int(problem.counts.sum()),
                    route=route,
                    rank=0,
                    nearness=None if nearness is None else nearness.cuda(),
                )
                for tensors, problem in zip(inputs, problems, strict=True)
            ]
            error = max(
                float(differs(call(), tensors, route, nearness))
                for call, tensors in zip(calls, inputs, strict=True)
            )
            num_bytes = sum(tensor.nbytes for tensor in inputs[0]) + calls[0]().segments.nbytes
            yield Measurement(f"{name}, {layout}", "int32", calls, num_bytes, error, 0.0)


def arguments_of(problem: RouteProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Source offsets [W, E + 1], copy ranks [E, W], slots [E] on the host."""
    offsets = np.pad(problem.counts.cumsum(axis=1), ((0, 0), (1, 0))).astype(np.int32)
    slots = torch.arange(problem.counts.shape[1], dtype=torch.int32)
    return torch.from_numpy(offsets), torch.from_numpy(problem.copy_ranks), slots


def differs(
    found: RouteSplit,
    tensors: tuple[Tensor, Tensor, Tensor],
    route: str,
    nearness: Tensor | None,
) -> bool:
    """Whether the kernel's answer is another than the reference's."""
    wanted = route_reference.route_split(
        *tensors,
        TOKENS_PER_TILE,
        found.groups.num_pairs,
        route=route,
        rank=0,
        nearness=nearness,
    )
    exists = tensors[1] >= 0
    return not (
        torch.equal(found.segments.cpu()[:, exists], wanted.segments[:, exists])
        and torch.equal(found.groups.offsets.cpu(), wanted.groups.offsets)
        and torch.equal(found.rank_pairs.cpu(), wanted.rank_pairs)
    )


if __name__ == "__main__":
    sys.exit(run("route", measure, __doc__))
