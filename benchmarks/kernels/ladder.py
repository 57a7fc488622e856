"""What each step of a grouped product is worth: naive, tiled, swizzled, pipelined, ours, fused.

    python benchmarks/kernels/ladder.py [--shape mixtral] [--tokens 2048]

Every step computes the same: the gather of the token rows, the product with gate and up of the
expert of each pair, and SwiGLU, in bf16. Steps 1 to 5 do it in three kernels, step 6 in one; steps
1 to 4 are the kernels of ladder.cu, 5 and 6 the library's. Needs sm_80 or later.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ceilings
import native
import products
import results
import torch
from checking import ERROR_LIMITS
from compiled import kernel
from floors import SHAPES
from glue import gather, silu_and_mul
from native import Launch
from products import Case
from timing import time_graph
from torch import Tensor

from lightmoe.kernels.library import FOLDER, Library, using
from lightmoe.kernels.tiles import Tile

TILE = 128
THREADS = 256
STAGE_BYTES = 2 * TILE * 64 * 2
LIMIT = 2 * ERROR_LIMITS["bf16"]  # the unfused steps round gate and up to bf16 once more


@dataclass(frozen=True)
class Step:
    """One rung: its name, what changed, and what to launch."""

    name: str
    change: str
    call: Callable[[], None]


def main() -> int:
    """Measure every step; 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", default="mixtral", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--arch", help="folder of kernels; the card's own by default")
    parser.add_argument("--library", type=Path, default=FOLDER, help="folder of liblight_ops.so")
    parser.add_argument("--seconds-per-row", type=float, default=0.1)
    parser.add_argument("--commit", help="of a copy without .git")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    commit = results.commit(arguments.commit)
    measured = ceilings.measure()
    print(measured.summary())
    shape = SHAPES[arguments.shape]
    case = products.make_cases(
        shape, arguments.tokens, "bf16", torch.bfloat16, "uniform", measured.l2_bytes, (1,)
    )[0]
    rows: list[dict[str, Any]] = []
    with using(arguments.library, arguments.arch) as library:
        for step in steps(case, library):
            row = products.measure(case, [step.call], "sm80", measured, arguments.seconds_per_row)
            row["gain"] = rows[-1]["ms"] / row["ms"] if rows else 1.0
            row["correct"] = row["error"] <= LIMIT
            label = {"shape": shape.name, "tokens": arguments.tokens, "dtype": "bf16"}
            rows.append({**label, "kernel": step.name, "change": step.change, **row})
            print(
                f"{step.name:10} {row['ms']:10.4f} ms {row['tflops']:7.1f} TFLOP/s "
                f"{row['gain']:6.2f} x  error {row['error']:.1e}  {step.change}",
                flush=True,
            )
    results.write("ladder", rows, measured.to_json(), commit, arguments.out)
    return 0 if all(row["correct"] for row in rows) else 1


def steps(case: Case, library: Library) -> list[Step]:
    """The rungs in order."""
    tile = best_tile(case, library)
    return [
        Step("naive", "a thread an output, operands from global memory", naive(case)),
        Step(
            "tiled", "128 x 128 tiles in shared memory, ldmatrix and mma", tiled(case, "tiled", 1)
        ),
        Step("swizzled", "no bank conflicts", tiled(case, "swizzled", 1)),
        Step("pipelined", "cp.async, three stages", tiled(case, "pipelined", 3)),
        Step("library", f"the library's kernel ({tile.name})", unfused(case, library, tile)),
        Step("fused", "gather in its loads, SwiGLU in its epilogue", fused(case, library, tile)),
    ]


def naive(case: Case) -> Callable[[], None]:
    """Step 1."""
    launch = kernel("ladder.cu", "naive")
    offsets = products.groups_of(case, TILE).offsets

    def product(rows: Tensor, weights: Tensor, out: Tensor) -> None:
        grid = (-(-out.shape[1] // 16), -(-len(out) // 16))
        launch(grid, 256, rows, weights, offsets, out, len(out), rows.shape[1], out.shape[1])

    return around(case, product)


def tiled(case: Case, name: str, num_stages: int) -> Callable[[], None]:
    """Steps 2 to 4."""
    launch = kernel("ladder.cu", name, num_stages * STAGE_BYTES)
    groups = products.groups_of(case, TILE)
    tables = (groups.offsets, groups.tile_offsets, groups.tile_groups)

    def product(rows: Tensor, weights: Tensor, out: Tensor) -> None:
        features, depth = weights.shape[1:]
        assert features % TILE == depth % 64 == 0, "ladder.cu cuts whole tiles only"
        grid = (len(groups.tile_groups), features // TILE)
        launch(grid, THREADS, rows, weights, *tables, out, depth, features)

    return around(case, product)


def unfused(case: Case, library: Library, tile: Tile) -> Callable[[], None]:
    """Step 5."""
    groups = products.groups_of(case, tile.tokens)

    def product(rows: Tensor, weights: Tensor, out: Tensor) -> None:
        native.grouped_gemm(library, Launch(tile), rows, weights, groups, None, out, swiglu=False)

    return around(case, product)


def fused(case: Case, library: Library, tile: Tile) -> Callable[[], None]:
    """Step 6."""
    groups = products.groups_of(case, tile.tokens)
    rows, weights = case.rows[0], case.matrix(0)
    return lambda: native.grouped_gemm(
        library, Launch(tile), rows, weights, groups, case.pair_row, case.output, swiglu=True
    )


def around(case: Case, product: Callable[[Tensor, Tensor, Tensor], None]) -> Callable[[], None]:
    """Gather, product, SwiGLU as kernels of their own."""
    weights = case.matrix(0)
    gate_up = case.output.new_empty(len(case.output), weights.shape[1])

    def call() -> None:
        assert case.pair_row is not None
        product(gather(case.rows[0], case.pair_row), weights, gate_up)
        silu_and_mul(gate_up, case.output)

    return call


def best_tile(case: Case, library: Library) -> Tile:
    """The library's fastest tile here that is compiled with and without SwiGLU."""
    architecture = library.architecture or library.architecture_of(case.output.device)
    names = library.manifest.kernels[architecture]
    built = functools.partial(
        native.built_tiles, architecture, names, "grouped_gemm", torch.bfloat16
    )
    plain, both = built(swiglu=False), built(swiglu=True)
    candidates = [tile for tile in both if tile in plain]
    return min(candidates, key=lambda tile: _trial_ms(fused(case, library, tile)))


def _trial_ms(call: Callable[[], None]) -> float:
    return time_graph([call], 0.02).ms


if __name__ == "__main__":
    sys.exit(main())
