"""One whole MoE layer from router logits to output, beside others and beside the card's floor.

    python benchmarks/kernels/moe_layer.py [--shapes mixtral] [--tokens 64 4096] [--dtypes bf16]
        [--impls lightmoe torch_grouped_mm] [--impl package.module:function] [--arch 75ptx]

logits -> softmax, top-k, permutation -> gate and up, SwiGLU -> down -> weighted combine. Timed by
CUDA-graph replay with inputs that rotate past the L2; every implementation is first checked
against float64 with its output poisoned. Exit status 1 where one is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ceilings
import results
import torch
from adapters import Unsupported
from ceilings import Ceilings
from checking import error_limit, poisoned, reference_dtype
from floors import SHAPES, Shape, floor, instruction_of, layer_work, path_of
from problem import (
    TORCH_DTYPES,
    ExpertWeights,
    Problem,
    make_logits,
    make_weights,
    num_sets_needed,
    reference,
    relative_error,
    route,
)
from timing import Timing, time_graph
from torch import Tensor

TOKENS = (1, 16, 48, 64, 256, 700, 1024, 4096, 16384)
IMPLS = {
    "lightmoe": "adapters.lightmoe_layer:make",
    "torch_grouped_mm": "adapters.grouped_mm:make",
    "transformers": "adapters.transformers_experts:make",
    "vllm": "adapters.vllm_layer:make_fused",
    "vllm_marlin": "adapters.vllm_layer:make_marlin",
}
USUAL = {"sm75": "fp16", "sm80": "bf16", "sm90": "bf16"}  # activations of a path
Make = Callable[[Problem], Callable[[], Tensor]]


def main() -> int:
    """Measure, print, write; 1 where an implementation is wrong."""
    arguments = parse_arguments()
    commit = results.commit(arguments.commit)
    measured = ceilings.measure()
    print(measured.summary())
    path = path_of(arguments.arch, measured.capability)
    rows: list[dict[str, Any]] = []
    with lightmoe_kernels(arguments.arch):
        for shape in (SHAPES[name] for name in arguments.shapes):
            for dtype in arguments.dtypes or (USUAL[path], "int4"):
                rows += measure_shape(shape, dtype, path, arguments, measured)
    if rows:
        results.write("moe_layer", rows, measured.to_json(), commit, arguments.out)
    wrong = [row for row in rows if not row["correct"]]
    for row in wrong:
        print(f"WRONG: {row['shape']} T={row['tokens']} {row['impl']}: {row['error']:.1e}")
    return 1 if wrong or not rows else 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--dtypes", nargs="+", default=None, help="bf16 fp16 int4 int8 fp8")
    parser.add_argument("--activation", choices=TORCH_DTYPES, help="of int4, int8 and fp8 rows")
    parser.add_argument("--routing", nargs="+", default=["uniform"], help="uniform zipf:1.0")
    parser.add_argument("--modes", nargs="+", default=["free", "deterministic"])
    parser.add_argument("--impls", nargs="+", default=["lightmoe", "torch_grouped_mm"])
    parser.add_argument("--impl", action="append", default=[], help="module:function, see adapters")
    parser.add_argument("--arch", help="lightmoe's kernels, such as 75ptx; the card's by default")
    parser.add_argument("--seconds-per-row", type=float, default=0.15)
    parser.add_argument("--commit", help="of a copy without .git")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.impls if name not in IMPLS]
    if unknown:
        parser.error(f"--impls {unknown[0]}: give some of {', '.join(IMPLS)}, or --impl")
    return arguments


def lightmoe_kernels(architecture: str | None) -> Any:
    """A context in which lightmoe's operators use the kernels of an architecture."""
    from lightmoe.kernels import library

    return library.using(architecture=architecture)


def find_make(name: str) -> Make:
    """The function of an implementation: one of IMPLS, or module:function."""
    module, _, function = IMPLS.get(name, name).partition(":")
    make: Make = getattr(importlib.import_module(module), function)
    return make


def measure_shape(
    shape: Shape, dtype: str, path: str, arguments: argparse.Namespace, measured: Ceilings
) -> list[dict[str, Any]]:
    """All rows of one shape and dtype; the weights are made once."""
    usual = arguments.activation or USUAL[path]
    activation = TORCH_DTYPES[dtype if dtype in TORCH_DTYPES else usual]
    weights: list[ExpertWeights] = []
    rows = []
    for num_tokens in arguments.tokens:
        for routing in arguments.routing:
            problems = make_problems(
                shape, num_tokens, dtype, routing, activation, weights, measured
            )
            expected = [
                reference(problem, reference_dtype(problem, measured.capability))
                for problem in problems
            ]
            for impl in (*arguments.impls, *arguments.impl):
                for mode in arguments.modes if impl == "lightmoe" else ("free",):
                    label = {
                        "shape": shape.name,
                        "tokens": num_tokens,
                        "dtype": dtype,
                        "routing": routing,
                        "mode": mode,
                        "impl": impl,
                    }
                    moded = [replace_mode(problem, mode) for problem in problems]
                    row = measure_row(
                        label, moded, expected, path, arguments.seconds_per_row, measured
                    )
                    if row is not None:
                        rows.append(row)
                        print(line(row), flush=True)
            torch.cuda.empty_cache()
    return rows


def make_problems(
    shape: Shape,
    num_tokens: int,
    dtype: str,
    routing: str,
    activation: torch.dtype,
    weights: list[ExpertWeights],
    measured: Ceilings,
) -> list[Problem]:
    """Enough sets of one problem to leave the L2; `weights` grows as they need it."""
    first = one_problem(shape, num_tokens, routing, activation, weights, dtype, 0)
    free = torch.cuda.mem_get_info()[0] // 3 + len(weights) * held_bytes(weights[0])
    num_sets = num_sets_needed(shape, dtype, num_active(first), measured.l2_bytes, free)
    others = [
        one_problem(shape, num_tokens, routing, activation, weights, dtype, index)
        for index in range(1, num_sets)
    ]
    return [first, *others]


def one_problem(
    shape: Shape,
    num_tokens: int,
    routing: str,
    activation: torch.dtype,
    weights: list[ExpertWeights],
    dtype: str,
    index: int,
) -> Problem:
    """Set `index` of a problem; fresh tokens and logits, the weights of that set."""
    if index == len(weights):
        first = index == 0
        weights.append(
            make_weights(shape, dtype, activation, seed=0) if first else weights[0].rolled(index)
        )
    seed = 1000 * num_tokens + index
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(num_tokens, shape.hidden_size, generator=generator, device="cuda")
    logits = make_logits(shape, num_tokens, routing, seed)
    output = torch.empty(num_tokens, shape.hidden_size, dtype=activation, device="cuda")
    return Problem(shape, "free", hidden.to(activation), logits, weights[index], output)


def held_bytes(weights: ExpertWeights) -> int:
    """Bytes of one set of weights in the forms that are kept."""
    total = weights.gate_up.nbytes + weights.down.nbytes
    if weights.gate_up_codes is not None and weights.down_codes is not None:
        total += weights.gate_up_codes.values.nbytes + weights.down_codes.values.nbytes
    return total + (0 if weights.fp8 is None else weights.fp8.blobs.nbytes)


def num_active(problem: Problem) -> int:
    """Experts that at least one token chose."""
    return len(torch.unique(route(problem)[0]))


def replace_mode(problem: Problem, mode: str) -> Problem:
    """The same inputs under another mode."""
    fields = {name: getattr(problem, name) for name in problem.__dataclass_fields__}
    return Problem(**(fields | {"mode": mode}))


def measure_row(
    label: dict[str, Any],
    problems: Sequence[Problem],
    expected: Sequence[Tensor],
    path: str,
    seconds: float,
    measured: Ceilings,
) -> dict[str, Any] | None:
    """Check and time one implementation; None where it cannot do this."""
    try:
        make = find_make(label["impl"])
        calls = [make(problem) for problem in problems]
    except Unsupported as reason:
        print(f"left out: {label['impl']} {label['dtype']}: {reason}")
        return None
    error = max(
        relative_error(poisoned(call, problem), right)
        for call, problem, right in zip(calls, problems, expected, strict=True)
    )
    timing = time_graph(calls, seconds)
    activation = "bf16" if problems[0].hidden.dtype == torch.bfloat16 else "fp16"
    active = sum(map(num_active, problems)) / len(problems)
    return make_row(label, timing, error, active, activation, path, measured) | {
        "tile": getattr(calls[0], "tile", ""),
        "num_sets": len(problems),
    }


def make_row(
    label: dict[str, Any],
    timing: Timing,
    error: float,
    active: float,
    activation: str,
    path: str,
    measured: Ceilings,
) -> dict[str, Any]:
    """A row of the result file: the label, the times, and their shares of what is possible."""
    work = layer_work(SHAPES[label["shape"]], label["tokens"], active, label["dtype"])
    arithmetic = "fp8" if label["dtype"] == "fp8" else activation
    least = floor(work, measured.matmul[arithmetic], measured.bandwidth)
    instruction = instruction_of(arithmetic, path)
    return {
        **label,
        "path": path,
        **asdict(timing),
        "floor_ms": least.ms,
        "bound": least.bound,
        "share_of_floor": least.ms / timing.ms,
        "share_of_instruction": work.flops / (1e-3 * timing.ms) / measured.rate(instruction),
        "instruction": instruction,
        "tflops": work.flops / timing.ms / 1e9,
        "gb_per_second": work.num_bytes / timing.ms / 1e6,
        "active_experts": active,
        "error": error,
        "correct": error <= error_limit(label["impl"], activation, label["dtype"]),
        "time": time.strftime("%H:%M:%S"),
    }


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    return (
        f"{row['shape']:8} T={row['tokens']:<6}{row['dtype']:5}{row['routing']:9}"
        f"{row['mode'][:4]:5}{row['impl'][-24:]:17}{row['ms']:9.4f} ms "
        f"[{row['ms_p10']:.4f} {row['ms_p90']:.4f}] floor {row['share_of_floor']:6.1%} "
        f"instr {row['share_of_instruction']:6.1%} {row['tflops']:6.1f} TFLOP/s "
        f"{row['gb_per_second']:6.0f} GB/s err {row['error']:.1e} {row['tile']}"
    )


if __name__ == "__main__":
    sys.exit(main())
