"""What the benches of topk_gate, combine and permute share: their command line, rows, result file.

These stems move bytes and hardly compute, so their floor is bytes over bandwidth; where they are
short, the floor is far below what one launch takes, and the microseconds are what to read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ceilings
import results
import torch
from ceilings import Ceilings
from floors import SHAPES, Shape, path_of
from timing import time_graph

from lightmoe.kernels.library import library, using

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
MAX_SETS = 16


@dataclass(frozen=True)
class Measurement:
    """Calls of one kernel on several sets of inputs, the bytes of one, and how wrong it is."""

    kernel: str
    dtype: str
    calls: Sequence[Callable[[], object]]
    num_bytes: float
    error: float
    error_limit: float


Measure = Callable[[Shape, int, Ceilings], Iterable[Measurement]]


def num_sets(num_bytes: float, l2_bytes: int) -> int:
    """Sets of inputs that do not fit the L2 together, so that each comes from memory."""
    return max(1, min(MAX_SETS, int(3 * l2_bytes / num_bytes) + 1))


def run(stem: str, measure: Measure, description: str | None) -> int:
    """Measure, print and write a stem's rows; 1 where one is wrong."""
    arguments = parse_arguments(description)
    commit = results.commit(arguments.commit)
    measured = ceilings.measure()
    print(measured.summary())
    rows: list[dict[str, Any]] = []
    with using(architecture=arguments.arch):
        library().set_overlapped_launch(arguments.overlapped)
        for name in arguments.shapes:
            for tokens in arguments.tokens:
                for measurement in measure(SHAPES[name], tokens, measured):
                    rows.append(make_row(measurement, name, tokens, arguments, measured))
                    print(line(rows[-1]), flush=True)
                torch.cuda.empty_cache()
        library().set_overlapped_launch(True)
    results.write(stem, rows, measured.to_json(), commit, arguments.out)
    return 0 if all(row["correct"] for row in rows) else 1


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--arch", help="folder of kernels, such as 75ptx; the card's by default")
    parser.add_argument("--overlapped", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds-per-row", type=float, default=0.05)
    parser.add_argument("--commit", help="of a copy without .git")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the result")
    return parser.parse_args()


def make_row(
    measurement: Measurement,
    shape: str,
    tokens: int,
    arguments: argparse.Namespace,
    measured: Ceilings,
) -> dict[str, Any]:
    """A row of the result file."""
    timing = time_graph(measurement.calls, arguments.seconds_per_row)
    floor_ms = 1e3 * measurement.num_bytes / measured.bandwidth
    return {
        "shape": shape,
        "tokens": tokens,
        "dtype": measurement.dtype,
        "routing": "uniform",
        "mode": "deterministic",
        "impl": "lightmoe",
        "path": path_of(arguments.arch, measured.capability),
        "kernel": measurement.kernel + ("" if arguments.overlapped else " (launches apart)"),
        **asdict(timing),
        "floor_ms": floor_ms,
        "bound": "memory",
        "share_of_floor": floor_ms / timing.ms,
        "gb_per_second": measurement.num_bytes / timing.ms / 1e6,
        "error": measurement.error,
        "correct": measurement.error <= measurement.error_limit,
    }


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    return (
        f"{row['shape']:8} T={row['tokens']:<6}{row['dtype']:5}{row['kernel']:42}"
        f"{1e3 * row['ms']:9.2f} us [{1e3 * row['ms_p10']:.2f} {1e3 * row['ms_p90']:.2f}] "
        f"{row['gb_per_second']:6.0f} GB/s floor {row['share_of_floor']:6.1%} "
        f"err {row['error']:.1e}{'' if row['correct'] else ' WRONG'}"
    )
