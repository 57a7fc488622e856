"""`lightmoe replay`: what it is asked, checked; the table that it prints and the JSON it writes.

Predicted step time is a model, not a measurement: ranks wait for the fullest one in every layer, so
a step takes the pairs of the fullest ranks, summed over the layers, times what one pair takes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from lightmoe.balancer.batched_routes import MAX_RANKS_OF_OPTIMUM
from lightmoe.balancer.replay import (
    DEFAULT_REPLAN_EVERY,
    ROUTES,
    Ranks,
    Replay,
    homes_and_spares,
    replay,
    spread_ranks,
)
from lightmoe.balancer.trace import RoutingTrace, read_trace
from lightmoe.errors import TraceError, UsageError

MIXTRAL_EXPERT_BYTES = 352_321_536
"""One expert of Mixtral-8x7B in 16 bits: 3 x 4096 x 14336 weights."""

MIXTRAL_PAIR_MICROSECONDS = 7.0
"""The same expert on one token, 352 MFLOP, at 50 TFLOP/s, about what an RTX 2080 Ti reaches."""

_LEAST = {
    "gpus": 1,
    "spares": 0,
    "slots_per_spare": 0,
    "replica_slots": 0,
    "replan_every": 1,
    "expert_bytes": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """The flags of `lightmoe replay`, None for one not given; UsageError where they contradict."""

    gpus: int
    spares: int | None = None
    placement: Literal["spare", "spread"] = "spare"
    routes: tuple[str, ...] = tuple(ROUTES)
    slots_per_spare: int | None = None
    replica_slots: int | None = None
    replan_every: int = DEFAULT_REPLAN_EVERY
    expert_bytes: int = MIXTRAL_EXPERT_BYTES
    pair_microseconds: float = MIXTRAL_PAIR_MICROSECONDS

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} {value}: give at least {least}")
        if not 0 < self.pair_microseconds < float("inf"):
            raise UsageError(f"--pair-microseconds {self.pair_microseconds}: give a positive time")
        self._check_routes()
        self._check_placement()

    def _check_routes(self) -> None:
        for route in self.routes:
            if route not in ROUTES:
                raise UsageError(f"--route {route!r} is unknown; give some of {', '.join(ROUTES)}")
        if "lp" in self.routes and self.gpus > MAX_RANKS_OF_OPTIMUM:
            raise UsageError(
                f"--route lp is for {MAX_RANKS_OF_OPTIMUM} ranks at most, not {self.gpus};"
                " leave it out"
            )

    def _check_placement(self) -> None:
        if self.placement == "spread":
            if self.spares is not None:
                raise UsageError("--spares is for --placement spare; leave one of the two out")
            if self.slots_per_spare is not None:
                raise UsageError("--slots-per-spare is for --placement spare; give --replica-slots")
            return
        if self.replica_slots is not None:
            raise UsageError("--replica-slots is for --placement spread; give --slots-per-spare")
        if self.num_spares >= self.gpus:
            raise UsageError(
                f"--spares {self.num_spares} of {self.gpus} ranks leave no home; give fewer"
            )
        if self.slots_per_spare and not self.num_spares:
            raise UsageError("--slots-per-spare without a spare; give --spares")

    @property
    def num_spares(self) -> int:
        """Ranks that hold replicas only."""
        if self.spares is not None:
            return self.spares
        return 2 if self.placement == "spare" and self.gpus >= 4 else 0

    def ranks(self, num_layers: int, num_experts: int) -> Ranks:
        """The ranks and their slots for a model of this shape."""
        default = default_slots_per_spare(num_experts)
        shape = (num_layers, num_experts, self.gpus)
        if self.placement == "spare":
            slots = default if self.slots_per_spare is None else self.slots_per_spare
            return homes_and_spares(*shape, self.num_spares, slots)
        slots = 2 * default if self.replica_slots is None else self.replica_slots
        return spread_ranks(*shape, slots)


def default_slots_per_spare(num_experts: int) -> int:
    """Slots a spare and layer: for a quarter of the experts, and three at least, as eight need."""
    return max(3, num_experts // 4)


def run(path: Path, options: ReplayOptions, json_path: Path | None, plot_path: Path | None) -> None:
    """Replay the trace, print the table, and write the files asked for."""
    if plot_path is not None:
        _need_matplotlib(plot_path)
    trace = read_trace(path)
    ranks = options.ranks(trace.num_layers, trace.num_experts)
    result = replay(trace, ranks, options.routes, options.replan_every)
    _print(trace, ranks, result, options)
    try:
        if json_path is not None:
            text = json.dumps(summary(result, options.expert_bytes), indent=1)
            json_path.write_text(text + "\n", encoding="utf-8")
        if plot_path is not None:
            from lightmoe.balancer.replay_figure import draw_replay

            step_ms = {
                route: predicted_step_ms(result, route, options.pair_microseconds)
                for route in result.max_pairs
            }
            draw_replay(result, step_ms, path.name).savefig(plot_path, format="png")
    except OSError as error:
        raise TraceError(f"{error.filename} cannot be written: {error.strerror}") from None


def _need_matplotlib(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path} ends in {path.suffix or 'no suffix'}; give a .png")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError(
            f"--plot {path} needs matplotlib; pip install 'lightmoe[plot]', or leave it out"
        ) from None


def summary(result: Replay, expert_bytes: int) -> dict[str, dict[str, float]]:
    """The JSON: means and 95th percentiles over steps and layers, bytes of all plans together."""
    moved_bytes = sum(result.moved_copies) * expert_bytes
    return {
        route: {
            "max_over_mean": float(result.max_over_mean(route).mean()),
            "max_over_mean_p95": float(np.percentile(result.max_over_mean(route), 95)),
            "moved_bytes": moved_bytes,
        }
        for route in result.max_pairs
    }


def predicted_step_ms(result: Replay, route: str, pair_microseconds: float) -> float:
    """The mean step's milliseconds in the experts of all layers."""
    return float(result.max_pairs[route].sum(axis=1).mean()) * pair_microseconds / 1e3


def _print(trace: RoutingTrace, ranks: Ranks, result: Replay, options: ReplayOptions) -> None:
    replicas = sum(ranks.slots_per_rank) / trace.num_layers - trace.num_experts
    kinds = f"{ranks.num_ranks - ranks.num_spares}+{ranks.num_spares} ranks"
    table = Table(title=f"{kinds}, {trace.num_experts} experts, {replicas:g} replica slots a layer")
    for column in ("route", "max/mean", "p95", "moved", "predicted step"):
        table.add_column(column, justify="left" if column == "route" else "right")
    for route, figures in summary(result, options.expert_bytes).items():
        table.add_row(
            route,
            f"{figures['max_over_mean']:.3f}",
            f"{figures['max_over_mean_p95']:.3f}",
            f"{figures['moved_bytes'] / 2**30:.2f} GiB",
            f"{predicted_step_ms(result, route, options.pair_microseconds):.2f} ms",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{trace.num_steps} steps, {trace.num_layers} layers, {len(result.planned_after)} plans,"
        f" {sum(result.moved_copies)} experts of {options.expert_bytes / 2**20:.0f} MiB moved,"
        f" {options.pair_microseconds:g} us a pair",
        highlight=False,
    )
