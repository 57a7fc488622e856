"""One MoE layer under skewed routing: no replicas, replicas on spares and spread, each route.

    python benchmarks/bench_skewed_layer.py --ranks 4 --spares 1 --seeds 0 1 2

Every rank, a spare too, has --tokens tokens, whose experts are drawn as `--routing-skew` does.
Plans are made from a window of other tokens of the same skew. `uniform` has one copy of each expert
over all ranks alike, `uniform, homes` over the homes only, as `no replicas`. The ratios are of
tokens/s; `predicted` is what the optimum of the linear program would bring against no replicas if a
layer took as long as its fullest rank. Answers are compared bit by bit with those without replicas.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import protocol
import torch
from ep_ranks import SETTINGS, SHAPES, RankLayer, Shape, line_of, run_ranks
from torch import Tensor

from lightmoe.balancer.batched_routes import copy_table, least_maximum
from lightmoe.balancer.planner import plan
from lightmoe.balancer.replay import Ranks, homes_and_spares, spread_ranks
from lightmoe.balancer.replay_command import default_slots_per_spare
from lightmoe.config import parse_skew
from lightmoe.distributed.communicator import Communicator
from lightmoe.distributed.peers import gather_bytes
from lightmoe.moe.placement import Placement, RankKind
from lightmoe.moe.skew import RoutingSkew

ALL_SHAPES = SHAPES | {"tiny": Shape(16, 4, 64, 32)}
WINDOW_STEPS = 4
PRINTED = (
    "case",
    "route",
    "tokens_per_second",
    "max_over_mean",
    "optimum",
    "over_no_replicas",
    "predicted",
    "over_uniform",
    "equal",
)


@dataclass(frozen=True)
class Case:
    """What one row measures."""

    name: str
    exponent: float
    placement: Placement
    route: str


def main() -> None:
    """Run every shape and seed and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--spares", type=int, default=1)
    parser.add_argument("--slots-per-spare", type=int, help="default: as lightmoe replay")
    parser.add_argument("--shapes", nargs="+", default=["qwen3"], choices=ALL_SHAPES)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--routing-skew", default="zipf:1.0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--road", choices=SETTINGS, default="ipc")
    parser.add_argument("--commit", help="the commit that is measured, where git does not know")
    options = parser.parse_args()
    rows = run_ranks(options.ranks, bench, vars(options))
    bench_name, card = "skewed-layer", None
    if torch.cuda.is_available():
        bench_name += f"-{options.road}"
        card = f"{options.ranks}x {torch.cuda.get_device_name()}"
    protocol.write(bench_name, rows, gpu=card, measured_commit=options.commit)


def bench(
    communicator: Communicator, device: torch.device, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """All rows, on one rank."""
    rows = []
    for name in options["shapes"]:
        for seed in options["seeds"]:
            for row in bench_skew(communicator, device, name, seed, options):
                rows.append(row)
                if communicator.rank == 0:
                    print(f"seed={seed}", line_of(row, PRINTED), flush=True)
    return rows


def bench_skew(
    communicator: Communicator,
    device: torch.device,
    name: str,
    seed: int,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """The rows of one shape and order of the experts."""
    shape, num_tokens, num_ranks = ALL_SHAPES[name], options["tokens"], communicator.num_ranks
    exponent = parse_skew(options["routing_skew"])
    slots = options["slots_per_spare"] or default_slots_per_spare(shape.num_experts)
    layout = Layout(shape.num_experts, num_ranks, options["spares"], slots)
    num_slots = layout.most_slots(communicator.rank)
    own = RankLayer(communicator, device, shape, num_tokens, options["road"], num_slots=num_slots)
    gates = {one: RoutingSkew(one, seed).instead_of(own.gate, 0) for one in (0.0, exponent)}
    own.gate = gates[exponent]
    window = sum(load_of(own, random_rows(own, num_tokens, step)) for step in range(WINDOW_STEPS))
    common = {
        "setting": SETTINGS[options["road"]] if device.type == "cuda" else "cpu",
        "shape": name,
        "ranks": num_ranks,
        "spares": options["spares"],
        "slots_per_spare": slots,
        "tokens_per_rank": num_tokens,
        "routing_skew": options["routing_skew"],
        "seed": seed,
        "mode": "deterministic",
    }
    hidden = own.hidden(num_tokens)
    earlier: dict[str, dict[str, Any]] = {}
    wanted: Tensor | None = None
    for case in layout.cases(exponent, np.asarray(window)):
        own.gate = gates[case.exponent]
        row, answer = bench_case(own, case, hidden)
        if case.name == "no replicas":
            wanted = answer
        if wanted is not None:
            row["equal"] = not own.slowest(float(not torch.equal(answer, wanted)))
        earlier.setdefault(case.name, row)
        yield common | row | compared(row, earlier)
    own.close()


@dataclass(frozen=True)
class Layout:
    """E experts of one layer over W ranks, some of them spares with so many slots."""

    num_experts: int
    num_ranks: int
    num_spares: int
    slots_per_spare: int

    def cases(self, exponent: float, load: np.ndarray) -> Iterator[Case]:
        """All rows in order; `load` [E] is what the plans are made from."""
        homes = self.num_ranks - self.num_spares
        yield Case("uniform", 0.0, self.contiguous(self.num_ranks), "none")
        yield Case("uniform, homes", 0.0, self.contiguous(homes), "none")
        yield Case("no replicas", exponent, self.contiguous(homes), "none")
        spare = plan(load[None], self.spare.slots_per_rank, num_spares=self.num_spares)
        for route in ("waterfill", "even", "none"):
            yield Case("spare", exponent, spare, route)
        spread = plan(load[None], self.spread.slots_per_rank, num_spares=0)
        for route in ("waterfill", "even", "none"):
            yield Case("spread", exponent, spread, route)

    @property
    def spare(self) -> Ranks:
        """Slots of homes and spares."""
        size = 1, self.num_experts, self.num_ranks
        return homes_and_spares(*size, self.num_spares, self.slots_per_spare)

    @property
    def spread(self) -> Ranks:
        """As many slots, over all ranks alike."""
        replica_slots = self.num_spares * self.slots_per_spare
        return spread_ranks(1, self.num_experts, self.num_ranks, replica_slots)

    def most_slots(self, rank: int) -> int:
        """What a rank needs for any of the cases."""
        homes = -(-self.num_experts // (self.num_ranks - self.num_spares))
        return max(homes, self.spare.slots_per_rank[rank], self.spread.slots_per_rank[rank])

    def contiguous(self, num_homes: int) -> Placement:
        """Experts in order over the first ranks, one copy of each."""
        homes = np.arange(self.num_experts) * num_homes // self.num_experts
        slot_table = np.full((1, self.num_experts, self.num_ranks), -1, dtype=np.int32)
        for rank in range(num_homes):
            (experts,) = np.nonzero(homes == rank)
            slot_table[0, experts, rank] = np.arange(len(experts))
        kinds: list[RankKind] = ["home"] * self.num_ranks
        return Placement(slot_table, homes[None].astype(np.int32), tuple(kinds))


def bench_case(own: RankLayer, case: Case, hidden: Tensor) -> tuple[dict[str, Any], Tensor]:
    """A row, and this rank's answer."""
    own.barrier()
    own.group.adopt(case.placement)
    own.group.route = case.route
    for _, expert, slot in case.placement.hosted(own.communicator.rank):
        generator = torch.Generator(own.device).manual_seed(expert)
        own.pool.blobs[slot].normal_(0, 0.02, generator=generator)
    layer = own.layer()
    answer = layer(hidden)
    times = own.measure(lambda: layer(hidden))
    pairs = pairs_of_ranks(own, lambda: layer(hidden))
    table = copy_table(case.placement.slot_table >= 0, case.placement.homes)
    optimum = least_maximum(load_of(own, hidden)[None], table, len(pairs))[0] / pairs.mean()
    num_tokens = len(hidden) * len(pairs)
    return {
        "case": case.name,
        "route": case.route,
        "layer_ms": times,
        "gate_ms": own.measure(lambda: own.gate(hidden))["median"],
        "tokens_per_second": num_tokens / times["median"] * 1e3,
        "max_over_mean": float(pairs.max() / pairs.mean()),
        "optimum": float(optimum),
        "equal": None,
    }, answer


def compared(row: dict[str, Any], earlier: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Tokens/s against the first row of each of these cases, None before there is one."""
    against = {
        f"over_{name.replace(', ', '_').replace(' ', '_')}": row["tokens_per_second"]
        / earlier[name]["tokens_per_second"]
        if name in earlier
        else None
        for name in ("uniform", "uniform, homes", "no replicas")
    }
    before = earlier.get("no replicas")
    return {
        "predicted": None if before is None else before["max_over_mean"] / row["optimum"],
        **against,
    }


def random_rows(own: RankLayer, num_tokens: int, step: int) -> Tensor:
    """This rank's hidden states of a step in the window."""
    torch.manual_seed(1000 * (step + 1) + own.communicator.rank)
    return torch.randn(num_tokens, own.shape.width, device=own.device, dtype=own.dtype)


def load_of(own: RankLayer, hidden: Tensor) -> np.ndarray:
    """Tokens of all ranks that each expert gets: float64 [E]."""
    experts = own.gate(hidden).experts.flatten().cpu().numpy()
    counts = np.bincount(experts, minlength=own.shape.num_experts).astype(np.float64)
    parts = gather_bytes(own.communicator, counts.tobytes())
    return np.sum([np.frombuffer(part) for part in parts], axis=0)


def pairs_of_ranks(own: RankLayer, call: Callable[[], object]) -> np.ndarray:
    """Pairs that each rank computes in one call: float64 [W]."""
    own.barrier()
    take_pairs(own)
    call()
    own.barrier()
    sent = np.float64(take_pairs(own)).tobytes()
    return np.concatenate([np.frombuffer(part) for part in gather_bytes(own.communicator, sent)])


def take_pairs(own: RankLayer) -> int:
    """Pairs computed here since last asked."""
    if own.lane is not None:
        return int(own.lane.pair_counter.move()[0])
    count = int(own.group.layer_pairs[0])
    own.group.layer_pairs[:] = 0
    return count


if __name__ == "__main__":
    main()
