"""Simulates the MoE pipeline on a described machine: `lightmoe simulate`.

A layer's choices are drawn, its tasks and bytes follow, and `fluid.py` runs them: computing by the
roofline of each rank's device, exchanges over shared links. `calibrate.py` fits the free parameters
to measured layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from lightmoe.balancer.fluid import Span, run
from lightmoe.balancer.pipeline_tasks import (
    Calibration,
    LayerShape,
    Load,
    StageFit,
    draw_choices,
    layer_program,
)
from lightmoe.errors import UsageError
from lightmoe.topology import Topology

Transport = Literal["nccl", "copy_engine", "gloo"]

# Until calibrated: NCCL's thread blocks take multiprocessors from the experts, copy engines only
# memory bandwidth (16 of 132, and what 0.3 of 4.3 TB/s are).
UNCALIBRATED: dict[Transport, Calibration] = {
    "nccl": Calibration(slowdown=0.12),
    "copy_engine": Calibration(slowdown=0.07),
    "gloo": Calibration(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is simulated: so many tokens on every rank of the topology.

    `serial` runs chunk after chunk without overlap, as CPU ranks do. With `results_beside` results
    leave while the second product makes them, as copy_engine's do. With two micro-batches, or
    several layers, attention is part of a layer; one layer alone is what the benches measure.
    """

    shape: LayerShape
    topology: Topology
    tokens_per_rank: int
    num_chunks: int = 1
    num_micro_batches: int = 1
    num_layers: int = 1
    skew: float = 0.0
    seed: int = 0
    serial: bool = False
    results_beside: bool = False
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        bounds = {"num_chunks": 64, "num_micro_batches": 2, "num_layers": 128}
        for name, most in bounds.items():
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"{name} is {getattr(self, name)}; give 1 to {most}")
        if not self.num_micro_batches <= self.tokens_per_rank <= 2**17:
            raise UsageError(
                f"tokens_per_rank is {self.tokens_per_rank};"
                f" give {self.num_micro_batches} to 131072"
            )

    @property
    def with_attention(self) -> bool:
        """Whether attention is part of what is simulated."""
        return self.num_micro_batches > 1 or self.num_layers > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """Times of the whole run, in seconds, and its timeline.

    | field | meaning |
    |---|---|
    | naive_seconds | one chunk, one micro-batch, nothing overlaps |
    | compute_seconds, exchange_seconds | the computing alone, the exchanges alone |
    | exposed_share | of the step, the mean rank waits for an exchange and does nothing else |
    | spans | of every rank |
    """

    step_seconds: float
    naive_seconds: float
    compute_seconds: float
    exchange_seconds: float
    exposed_share: float
    spans: Sequence[Sequence[Span]]

    @property
    def limit_seconds(self) -> float:
        """No pipeline is faster: the longer of computing alone and exchanging alone."""
        return max(self.compute_seconds, self.exchange_seconds)

    @property
    def hidden_fraction(self) -> float:
        """(compute + exchange - step) / min(compute, exchange); 0 where nothing is exchanged."""
        shorter = min(self.compute_seconds, self.exchange_seconds)
        both = self.compute_seconds + self.exchange_seconds
        return (both - self.step_seconds) / shorter if shorter else 0.0

    def to_json(self) -> dict[str, Any]:
        """The figures of a benchmark row, in milliseconds."""
        return {
            "ours_ms": self.step_seconds * 1e3,
            "naive_ms": self.naive_seconds * 1e3,
            "compute_ms": self.compute_seconds * 1e3,
            "comm_ms": self.exchange_seconds * 1e3,
            "limit_ms": self.limit_seconds * 1e3,
            "exposed_share": self.exposed_share,
            "hidden_fraction": self.hidden_fraction,
        }


def simulate(setup: Setup) -> Simulated:
    """Simulate the pipeline, and beside it: without overlap, computing alone, exchanging alone."""
    spans = run_setup(setup)
    naive = replace(setup, num_chunks=1, num_micro_batches=1, serial=True)
    if setup.with_attention and naive.num_layers == 1:
        naive_seconds = _end(run_setup(naive, with_attention=True))
    else:
        naive_seconds = _end(run_setup(naive))
    step = _end(spans)
    busy = [_busy_seconds(of_rank) for of_rank in spans]
    return Simulated(
        step_seconds=step,
        naive_seconds=naive_seconds,
        compute_seconds=_end(run_setup(setup, exchanging=False)),
        exchange_seconds=_end(run_setup(setup, computing=False)),
        exposed_share=1 - sum(busy) / len(busy) / step if step else 0.0,
        spans=spans,
    )


def simulated_seconds(setup: Setup) -> float:
    """The time of the whole run alone."""
    return _end(run_setup(setup))


def run_setup(
    setup: Setup,
    *,
    computing: bool = True,
    exchanging: bool = True,
    with_attention: bool | None = None,
) -> list[list[Span]]:
    """The spans of every rank, with the computing or the exchanges left out where asked."""
    calibration = setup.calibration
    if not computing:
        calibration = replace(calibration, compute=StageFit(factor=0.0))
    program = layer_program(
        setup.shape,
        setup.topology,
        _micro_batches(setup),
        num_layers=setup.num_layers,
        num_chunks=setup.num_chunks,
        serial=setup.serial,
        results_beside=setup.results_beside,
        with_attention=setup.with_attention if with_attention is None else with_attention,
        calibration=calibration,
    )
    exchanges = program.exchanges
    if not exchanging:
        exchanges = {name: np.zeros_like(matrix) for name, matrix in exchanges.items()}
    return run(
        setup.topology,
        program.tasks,
        exchanges,
        exchange_seconds=calibration.exchange.alpha_seconds,
        exchange_factor=calibration.exchange.factor,
        slowdown=calibration.slowdown,
    )


def _micro_batches(setup: Setup) -> list[np.ndarray]:
    """Choices [W, T, K] of each micro-batch."""
    choices = draw_choices(
        setup.shape, setup.topology.num_ranks, setup.tokens_per_rank, setup.skew, setup.seed
    )
    return np.array_split(choices, setup.num_micro_batches, axis=1)


def _end(spans: Sequence[Sequence[Span]]) -> float:
    return max((span.end for of_rank in spans for span in of_rank), default=0.0)


def _busy_seconds(spans: Sequence[Span]) -> float:
    """Seconds in which a rank computes."""
    computing = ("attention", "gate", "up", "experts")
    return sum(span.end - span.start for span in spans if stage_of(span) in computing)


def stage_of(span: Span) -> str:
    """The stage's name, the first part of a task's."""
    assert isinstance(span.name, tuple)
    return str(span.name[0])


def timeline(simulated: Simulated, rank: int, width: int = 72) -> list[str]:
    """One rank's streams as lines of text, a letter per stage, over the whole step."""
    letters = {"attention": "a", "gate": "g", "choice": "c", "exchange": "x"}
    letters |= {"up": "E", "experts": "E"}
    lines = []
    for stream in ("compute", "exchange"):
        cells = ["."] * width
        for span in simulated.spans[rank]:
            letter = letters.get(stage_of(span))
            if letter is None or (letter in "cx") != (stream == "exchange"):
                continue
            first = int(span.start / simulated.step_seconds * width)
            last = max(first + 1, round(span.end / simulated.step_seconds * width))
            cells[first:last] = letter * (min(last, width) - first)
        lines.append(f"{stream:8} {''.join(cells)}")
    return lines


def summary(setup: Setup, simulated: Simulated) -> list[str]:
    """What a person wants to know, and the timeline of the rank that ends last."""
    ms = {name: value for name, value in simulated.to_json().items() if name.endswith("_ms")}
    ends = [_end([of_rank]) for of_rank in simulated.spans]
    slowest = max(range(len(ends)), key=ends.__getitem__)
    what = "layer" if not setup.with_attention else f"{setup.num_layers} layers with attention"
    return [
        f"{setup.shape.name} on {setup.topology.name}, {setup.topology.num_ranks} ranks x"
        f" {setup.tokens_per_rank} tokens, {setup.num_chunks} chunks,"
        f" {setup.num_micro_batches} micro-batches",
        f"step {ms['ours_ms']:.3f} ms ({what}); without overlap {ms['naive_ms']:.3f} ms"
        f" ({ms['naive_ms'] / ms['ours_ms']:.2f}x)",
        f"limit {ms['limit_ms']:.3f} ms = max(computing {ms['compute_ms']:.3f}, exchanging"
        f" {ms['comm_ms']:.3f}); {ms['ours_ms'] / ms['limit_ms']:.2f}x of it",
        f"exposed {simulated.exposed_share:.0%} of the step; hidden"
        f" {simulated.hidden_fraction:.2f} of the shorter (ceiling about"
        f" {1 - 1 / setup.num_chunks:.2f} within one layer)",
        f"rank {slowest}, which ends last (a attention, g gate, c choice, x rows, E experts):",
        *timeline(simulated, slowest),
    ]


__all__ = [
    "UNCALIBRATED",
    "Calibration",
    "LayerShape",
    "Load",
    "Setup",
    "Simulated",
    "StageFit",
    "simulate",
    "summary",
]
