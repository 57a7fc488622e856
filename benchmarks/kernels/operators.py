"""The bench of one matrix operator as a model calls it: its own choice of tile, both modes.

What grouped_gemm.py and quant_gemm.py share.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ceilings
import results
import torch
from ceilings import Ceilings
from checking import ERROR_LIMITS
from floors import SHAPES, path_of
from problem import TORCH_DTYPES
from products import Case, groups_of, make_cases, measure
from torch import Tensor

from lightmoe.kernels import PairGroups
from lightmoe.kernels.library import using

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
Operator = Callable[[Case, int, bool], Callable[[], Tensor]]


def run(stem: str, dtypes: tuple[str, ...], operator: Operator, description: str | None) -> int:
    """Measure, print and write a stem's rows; 1 where one is wrong.

    `operator(case, index, deterministic)` is a call of the operator on set `index` of a case.
    """
    arguments = parse_arguments(dtypes, description)
    commit = results.commit(arguments.commit)
    measured = ceilings.measure()
    print(measured.summary())
    rows: list[dict[str, Any]] = []
    with using(architecture=arguments.arch):
        for name in arguments.shapes:
            for dtype in arguments.dtypes:
                for tokens in arguments.tokens:
                    rows += size_rows(stem, name, dtype, tokens, operator, arguments, measured)
                    torch.cuda.empty_cache()
    results.write(stem, rows, measured.to_json(), commit, arguments.out)
    return 0 if all(row["correct"] for row in rows) else 1


def parse_arguments(dtypes: tuple[str, ...], description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--dtypes", nargs="+", default=dtypes)
    parser.add_argument("--activation", choices=TORCH_DTYPES, help="of int4 and int8 rows")
    parser.add_argument("--routing", default="uniform", help="or zipf:<exponent>")
    parser.add_argument("--modes", nargs="+", default=["free", "deterministic"])
    parser.add_argument("--arch", help="folder of kernels, such as 75ptx; the card's by default")
    parser.add_argument("--seconds-per-row", type=float, default=0.05)
    parser.add_argument("--commit", help="of a copy without .git")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the result")
    return parser.parse_args()


def size_rows(
    stem: str,
    name: str,
    dtype: str,
    tokens: int,
    operator: Operator,
    arguments: argparse.Namespace,
    measured: Ceilings,
) -> list[dict[str, Any]]:
    """Rows of both products of one size, in each mode."""
    path = path_of(arguments.arch, measured.capability)
    usual = arguments.activation or ("fp16" if path == "sm75" else "bf16")
    activation = TORCH_DTYPES[dtype if dtype in TORCH_DTYPES else usual]
    rows = []
    for case in make_cases(
        SHAPES[name], tokens, dtype, activation, arguments.routing, measured.l2_bytes
    ):
        for mode in arguments.modes:
            calls = [
                operator(case, index, mode == "deterministic") for index in range(len(case.weights))
            ]
            row = measure(case, calls, path, measured, arguments.seconds_per_row)
            row["correct"] = row["error"] <= ERROR_LIMITS[case.activation]
            label = {
                "shape": name,
                "tokens": tokens,
                "dtype": dtype,
                "routing": arguments.routing,
                "mode": mode,
                "impl": "lightmoe",
                "path": path,
                "kernel": f"{stem} {case.product}",
            }
            rows.append(label | row)
            print(line(rows[-1]), flush=True)
    return rows


@functools.lru_cache(maxsize=8)
def _slots(num_experts: int) -> Tensor:
    return torch.arange(num_experts, dtype=torch.int32, device="cuda")


def pair_groups(case: Case, tokens_per_tile: int) -> PairGroups:
    """The case's pairs as the operators take them."""
    groups = groups_of(case, tokens_per_tile)
    return PairGroups(
        slots=_slots(len(case.counts)),
        offsets=groups.offsets,
        tile_offsets=groups.tile_offsets,
        tile_groups=groups.tile_groups,
        tokens_per_tile=tokens_per_tile,
        num_pairs=groups.num_pairs,
    )


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    return (
        f"{row['kernel']:15}{row['shape']:9}T={row['tokens']:<6}{row['dtype']:5}{row['mode'][:4]:5}"
        f"{row['ms']:9.4f} ms {row['tflops']:6.1f} TFLOP/s {row['gb_per_second']:6.0f} GB/s "
        f"floor {row['share_of_floor']:6.1%} instr {row['share_of_instruction']:6.1%} "
        f"err {row['error']:.1e}"
    )
