"""Every compiled tile of grouped_gemm or quant_gemm on every size: what tile choice is made from.

    python benchmarks/kernels/sweep.py --arch 90 --shapes mixtral --tokens 4096

For each product it prints every tile's time, TFLOP/s, GB/s and shares of the floor and of the
measured instruction rate, best first, each checked against float64. --json keeps the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ceilings
import native
import torch
from ceilings import Ceilings
from checking import ERROR_LIMITS
from floors import SHAPES, path_of
from native import Launch
from problem import NUM_BITS, TORCH_DTYPES
from products import Case, groups_of, make_cases, measure

from lightmoe.kernels.library import FOLDER, Library, using


def main() -> int:
    """Sweep and print; 1 where a tile is wrong."""
    arguments = parse_arguments()
    measured = ceilings.measure()
    print(measured.summary())
    rows: list[dict[str, Any]] = []
    with using(arguments.library, arguments.arch) as library:
        if arguments.arch not in library.manifest.kernels:
            built = ", ".join(library.manifest.kernels)
            raise SystemExit(f"no kernels of {arguments.arch} in {arguments.library}: {built}")
        for name in arguments.shapes:
            for dtype in arguments.dtypes:
                for tokens in arguments.tokens:
                    rows += sweep_size(name, dtype, tokens, library, arguments, measured)
                    torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if rows and all(row["correct"] for row in rows) else 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--arch", required=True, help="folder of kernels: 90, 80, 75, 75ptx ...")
    parser.add_argument("--library", type=Path, default=FOLDER, help="folder of liblight_ops.so")
    parser.add_argument("--shapes", nargs="+", default=["mixtral"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 4096])
    parser.add_argument("--dtypes", nargs="+", default=None, help="bf16 fp16 int4 int8")
    parser.add_argument("--activation", choices=TORCH_DTYPES, help="of int4 and int8 rows")
    parser.add_argument("--routing", default="uniform")
    parser.add_argument("--products", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--splits", nargs="+", type=int, default=[1], help="of the depth")
    parser.add_argument("--max-ctas", type=int, default=0)
    parser.add_argument("--seconds-per-row", type=float, default=0.05)
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    usual = "fp16" if arguments.arch.startswith("75") else "bf16"
    arguments.activation = arguments.activation or usual
    arguments.dtypes = arguments.dtypes or [usual]
    return arguments


def sweep_size(
    name: str,
    dtype: str,
    tokens: int,
    library: Library,
    arguments: argparse.Namespace,
    measured: Ceilings,
) -> list[dict[str, Any]]:
    """All tiles of both products of one size."""
    activation = TORCH_DTYPES[dtype if dtype in TORCH_DTYPES else arguments.activation]
    path = path_of(arguments.arch, measured.capability)
    rows: list[dict[str, Any]] = []
    for case in make_cases(
        SHAPES[name],
        tokens,
        dtype,
        activation,
        arguments.routing,
        measured.l2_bytes,
        arguments.products,
    ):
        stem = "quant_gemm" if case.packed else "grouped_gemm"
        names = library.manifest.kernels[arguments.arch]
        num_bits = NUM_BITS.get(dtype, 16)
        found: list[dict[str, Any]] = []
        for launch in launches(case, names, stem, num_bits, arguments):
            calls = [make_call(case, index, library, launch) for index in range(len(case.weights))]
            row = measure(case, calls, path, measured, arguments.seconds_per_row)
            row["correct"] = row["error"] <= ERROR_LIMITS[case.activation]
            label = {"shape": name, "tokens": tokens, "dtype": dtype, "tile": str(launch)}
            found.append(label | row)
        found.sort(key=lambda row: row["ms"])
        show(f"{name} T={tokens} {dtype} product {case.product}", case, found)
        rows += found
    return rows


def launches(
    case: Case, names: Iterable[str], stem: str, num_bits: int, arguments: argparse.Namespace
) -> Iterator[Launch]:
    """Every compiled tile with every number of splits that leaves none empty."""
    depth = case.matrix(0).shape[2]
    for tile in native.built_tiles(
        arguments.arch, names, stem, case.output.dtype, swiglu=case.swiglu, num_bits=num_bits
    ):
        stages = -(-depth // tile.depth)
        for splits in arguments.splits:
            if splits == 1 or -(-stages // -(-stages // splits)) == splits:
                yield Launch(tile, splits, arguments.max_ctas)


def make_call(case: Case, index: int, library: Library, launch: Launch) -> Callable[[], None]:
    """One launch on one set of inputs."""
    rows = case.rows[index]
    pairs = (groups_of(case, launch.tile.tokens), case.pair_row, case.output)
    if case.packed:
        return lambda: native.quant_gemm(library, launch, rows, case.packed[index], *pairs)
    return lambda: native.grouped_gemm(
        library, launch, rows, case.matrix(index), *pairs, swiglu=case.swiglu
    )


def show(title: str, case: Case, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one product."""
    counts = case.counts[case.counts > 0]
    print(
        f"\n{title}: {len(counts)} experts of {int(counts.min())}-{int(counts.max())} pairs, "
        f"{len(case.weights)} sets"
    )
    print(f"{'tile':34} {'ms':>8} {'TFLOP/s':>8} {'GB/s':>6} {'floor':>6} {'instr':>6} error")
    for row in rows:
        print(
            f"{row['tile']:34} {row['ms']:8.4f} {row['tflops']:8.1f} {row['gb_per_second']:6.0f} "
            f"{row['share_of_floor']:6.1%} {row['share_of_instruction']:6.1%} "
            f"{row['error']:.1e}{'' if row['correct'] else '  WRONG'}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
