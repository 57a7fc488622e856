"""Fits the simulator's free parameters to measured layers, and says how wrong it is on others.

Rows are those of benchmarks/: {setting, shape, tokens_per_rank, transport, chunks, mode, ours_ms,
compute_ms, comm_ms}, with optional `ranks`, `widths` [D, F, E, K] where the shape is none of those
known here, and `alone_chunks`, the chunks in which computing and exchanging were timed alone (1).
Rows of one setting, transport and mode share one set of parameters; every second of them is held
out. Of several rows that differ in nothing said here (a bench's tuning) the fastest counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightmoe.balancer.pipeline_tasks import Calibration, LayerShape, StageFit
from lightmoe.balancer.simulate import Setup, run_setup, simulated_seconds
from lightmoe.errors import UsageError
from lightmoe.topology import Topology

KNOWN_SHAPES = {
    "mixtral": (4096, 14336, 8, 2),
    "dsv2lite": (2048, 1408, 64, 6),
    "qwen3": (2048, 768, 128, 8),
}
_NEEDED = (
    "setting",
    "shape",
    "tokens_per_rank",
    "transport",
    "chunks",
    "mode",
    "ours_ms",
    "compute_ms",
    "comm_ms",
)
_SLOWDOWNS = tuple(step / 20 for step in range(15))
# What a stage may cost more inside a layer than alone, where the caches are its own.
_MORE_SECONDS = (0.0, 5e-6, 10e-6, 20e-6, 40e-6, 80e-6, 160e-6, 320e-6)
_SLOWER = tuple(1 + step / 20 for step in range(11))
_UNIT_SECONDS = 1e-3
_ALIKE_DIGITS = 9  # of a sum of squared shares: what differs less is alike
_LEAST_SHARE = 0.05  # of a measured time, where the latencies alone would explain it

Row = Mapping[str, Any]
Group = tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """One measured row beside what the simulator says with the parameters of its group."""

    row: Row
    seconds: float
    held_out: bool

    @property
    def error(self) -> float:
        """By what share of the measured time the simulated one is off, with its sign."""
        measured: float = self.row["ours_ms"] / 1e3
        return self.seconds / measured - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """The parameters of each (setting, transport, mode), and all rows predicted with them."""

    calibrations: Mapping[Group, Calibration]
    predicted: Sequence[Predicted]

    def errors(self, *, held_out: bool) -> list[float]:
        """Absolute relative errors of the rows that were, or were not, held out."""
        return [abs(row.error) for row in self.predicted if row.held_out == held_out]


def read_rows(path: Path) -> list[Row]:
    """The rows of a result file; UsageError where it is none, or a row lacks a field."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no benchmark result with rows: {error}") from error
    for row in rows:
        missing = [name for name in _NEEDED if name not in row]
        if missing:
            raise UsageError(f"a row of {path} lacks {', '.join(missing)}; see benchmarks/README")
    return list(rows)


def calibrate(rows: Sequence[Row], topology: Topology) -> Calibrated:
    """Fit every group on half of its rows; UsageError where a group has fewer than four."""
    groups: dict[Group, list[Row]] = {}
    for row in _fastest(rows):
        groups.setdefault((row["setting"], row["transport"], row["mode"]), []).append(row)
    calibrations, predicted = {}, []
    for group, members in groups.items():
        if len(members) < 4:
            raise UsageError(
                f"{', '.join(group)} has {len(members)} rows; four at least are needed to fit half"
                " of them and try the others"
            )
        members.sort(key=lambda row: (row["shape"], row["tokens_per_rank"], row["chunks"]))
        fitted = fit_rows(members[::2], topology)
        calibrations[group] = fitted
        for index, row in enumerate(members):
            seconds = simulated_seconds(setup_of(row, topology, fitted))
            predicted.append(Predicted(row=row, seconds=seconds, held_out=bool(index % 2)))
    return Calibrated(calibrations=calibrations, predicted=predicted)


def _fastest(rows: Sequence[Row]) -> list[Row]:
    best: dict[tuple[Any, ...], Row] = {}
    names = ("setting", "shape", "tokens_per_rank", "transport", "chunks", "mode")
    for row in rows:
        key = (*(row[name] for name in names), row.get("ranks"))
        if key not in best or row["ours_ms"] < best[key]["ours_ms"]:
            best[key] = row
    return list(best.values())


def fit_rows(rows: Sequence[Row], topology: Topology) -> Calibration:
    """Computing and exchanging from the times of each alone, then what the whole adds to them."""
    compute = _fit_stage(
        rows,
        "compute_ms",
        lambda row, fit: _alone(row, topology, Calibration(compute=fit), exchanging=False),
    )
    exchange = _fit_stage(
        rows,
        "comm_ms",
        lambda row, fit: _alone(row, topology, Calibration(exchange=fit), computing=False),
    )
    fitted = Calibration(compute=compute, exchange=exchange)
    # One parameter after the other; the slowdown again once the others are known.
    changes = [_slower_computing, _longer_computing, _longer_exchanges]
    if not all(_is_serial(row) for row in rows):
        changes = [_slowdowns, *changes, _slowdowns]
    for change in changes:
        fitted = min(change(fitted), key=lambda found: _whole_error(rows, topology, found))
    return fitted


def _slowdowns(fitted: Calibration) -> list[Calibration]:
    return [replace(fitted, slowdown=slowdown) for slowdown in _SLOWDOWNS]


def _slower_computing(fitted: Calibration) -> list[Calibration]:
    alone = fitted.compute
    slower = (replace(alone, factor=alone.factor * times) for times in _SLOWER)
    return [replace(fitted, compute=stage) for stage in slower]


def _longer_computing(fitted: Calibration) -> list[Calibration]:
    return [replace(fitted, compute=_longer(fitted.compute, more)) for more in _MORE_SECONDS]


def _longer_exchanges(fitted: Calibration) -> list[Calibration]:
    return [replace(fitted, exchange=_longer(fitted.exchange, more)) for more in _MORE_SECONDS]


def _longer(stage: StageFit, more_seconds: float) -> StageFit:
    return replace(stage, alpha_seconds=stage.alpha_seconds + more_seconds)


def _fit_stage(
    rows: Sequence[Row], measured: str, simulated: Callable[[Row, StageFit], float]
) -> StageFit:
    """alpha and factor, not negative, with the least squares of relative errors."""
    points = []
    for row in rows:
        # What neither alpha nor factor changes: the links' latencies.
        fixed = simulated(row, StageFit(factor=0.0))
        base = simulated(row, StageFit())
        with_alpha = simulated(row, StageFit(alpha_seconds=_UNIT_SECONDS))
        seconds = row[measured] / 1e3
        left = max(seconds - fixed, _LEAST_SHARE * seconds)
        points.append(((with_alpha - base) / _UNIT_SECONDS, base - fixed, left))
    return StageFit(**dict(zip(("alpha_seconds", "factor"), nonnegative(points), strict=True)))


def nonnegative(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """a, b >= 0 with a * u + b * v nearest y, over points (u, v, y), relative to y.

    Where points do not tell them apart, all of it is b: a stage that only measured whole layers of
    one size takes longer for more work, rather than for more pieces.
    """
    uu = sum((u / y) ** 2 for u, _, y in points)
    vv = sum((v / y) ** 2 for _, v, y in points)
    uv = sum(u * v / y**2 for u, v, y in points)
    uy, vy = sum(u / y for u, _, y in points), sum(v / y for _, v, y in points)
    candidates = [(0.0, vy / vv if vv else 0.0), (uy / uu if uu else 0.0, 0.0)]
    determinant = uu * vv - uv**2
    if determinant > 1e-12 * uu * vv:
        both = (uy * vv - vy * uv) / determinant, (vy * uu - uy * uv) / determinant
        candidates += [both] if min(both) >= 0 else []
    return min(
        candidates,
        key=lambda ab: round(
            sum(((ab[0] * u + ab[1] * v) / y - 1) ** 2 for u, v, y in points), _ALIKE_DIGITS
        ),
    )


def _whole_error(rows: Sequence[Row], topology: Topology, calibration: Calibration) -> float:
    total = 0.0
    for row in rows:
        seconds = simulated_seconds(setup_of(row, topology, calibration))
        total += (seconds * 1e3 / row["ours_ms"] - 1) ** 2
    return total


def _alone(row: Row, topology: Topology, calibration: Calibration, **left_out: bool) -> float:
    setup = setup_of(row, topology, calibration)
    alone = replace(setup, num_chunks=row.get("alone_chunks", 1))
    return max(span.end for of_rank in run_setup(alone, **left_out) for span in of_rank)


def _is_serial(row: Row) -> bool:
    return bool(row["mode"] == "serial" or row["chunks"] == 1)


def setup_of(row: Row, topology: Topology, calibration: Calibration) -> Setup:
    """What a row measured."""
    element_bytes = 4 if topology.device(0).kind == "cpu" else 2
    widths = row.get("widths") or KNOWN_SHAPES.get(row["shape"])
    if widths is None:
        raise UsageError(
            f"shape {row['shape']!r} is unknown and its row has no widths; known:"
            f" {', '.join(KNOWN_SHAPES)}"
        )
    hidden_size, expert_size, num_experts, num_per_token = widths
    shape = LayerShape(
        name=row["shape"],
        hidden_size=hidden_size,
        expert_size=expert_size,
        num_experts=num_experts,
        num_per_token=num_per_token,
        element_bytes=element_bytes,
        expert_element_bytes=element_bytes,
    )
    return Setup(
        shape=shape,
        topology=_machine_of(row, topology),
        tokens_per_rank=row["tokens_per_rank"],
        num_chunks=row["chunks"],
        serial=_is_serial(row),
        results_beside=row["transport"] == "copy_engine",
        calibration=calibration,
    )


def _machine_of(row: Row, topology: Topology) -> Topology:
    """The ranks that took part; "no-p2p" is measured with peer-to-peer and NVLink switched off."""
    machine = topology.first(row.get("ranks", topology.num_ranks))
    return replace(machine, fabrics=(), p2p_groups=()) if row["setting"] == "no-p2p" else machine
