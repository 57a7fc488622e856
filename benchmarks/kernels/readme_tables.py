"""The tables that `benchmarks/tables.py` puts into cute_kernels/README.md, from the newest results.

kernels: what there is, where it is tested and measured. moe_layer: share of the floor by shape and
T, beside the best published peer. ladder, counters: what the steps and the counters say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ncu
import peers
import results
from floors import SHAPES

NOT_MEASURED = "not measured"
TABLE_DTYPES = {"sm75": ("fp16",), "sm80": ("bf16", "int4"), "sm90": ("bf16", "int4")}
# stem: what it does, and the shapes that it takes
KERNELS = {
    "topk_gate": (
        "scores, top-k and the permutation of the pairs, with or without the router product",
        "E <= 512, K <= 16",
    ),
    "grouped_gemm": (
        "rows by slot x 16-bit expert weights, gather, SwiGLU and routing weight fused",
        "D, F multiples of 8, any count per slot",
    ),
    "quant_gemm": (
        "the same from int4 or int8 weights, groups of 128, 64 or 32, with or without zero points",
        "D, F multiples of 8, any count per slot",
    ),
    "combine": ("the weighted sum of a token's pairs in a fixed order", "D a multiple of 8"),
    "permute": (
        "rows packed per destination, as int8 or e4m3 with scales where asked",
        "16 bytes a row",
    ),
    "paged_attention": (
        "causal attention over a paged KV cache, decodes and prompts in one call",
        "widths up to 256, latents up to 576, multiples of 8",
    ),
    "route": (
        "the split of each expert's pairs over its copies, from the counts of all ranks",
        "E <= 512, W <= 64",
    ),
}


def kernels_table() -> str:
    """A line per stem."""
    lines = [
        "| kernel | what | shapes | file | test | bench | share of the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for stem, (what, shapes) in KERNELS.items():
        links = [
            f"[{stem}.cu]({stem}.cu)",
            f"[test_{stem}_gpu.py](../tests/kernels/test_{stem}_gpu.py)",
            f"[{stem}.py](../benchmarks/kernels/{stem}.py)",
        ]
        cells = [stem, what, shapes, *links, kernel_shares(stem)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernel_shares(stem: str) -> str:
    """A kernel's shares of the floor on the newest card, least to most; free mode if it has one."""
    measured = [
        result
        for result in results.newest(stem)
        if any("share_of_floor" in row for row in result["rows"])
    ]
    if not measured:
        return NOT_MEASURED
    result = measured[-1]
    shared = [row for row in result["rows"] if "share_of_floor" in row]
    rows = [row for row in shared if row.get("mode", "free") == "free"] or shared
    parts = []
    for bound in ("memory", "compute"):
        shares = [row["share_of_floor"] for row in rows if row["bound"] == bound]
        if shares:
            parts.append(f"{bound}-bound {min(shares):.0%}-{max(shares):.0%}")
    return f"{', '.join(parts)} ({result['device']}, {result['date']})"


def moe_layer_table() -> str:
    """Shares of the floor of a whole layer, by card, path, dtype, shape and T; the usual dtypes."""
    lines = [
        "| card | path | weights | shape | T | ms | of floor | of instruction"
        " | deterministic, of floor | best peer, of floor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results.newest("moe_layer"):
        rows = [row for row in result["rows"] if row["routing"] == "uniform"]
        ours = {key(row): row for row in rows if row["impl"] == "lightmoe"}
        for row in sorted(ours.values(), key=order):
            if row["mode"] == "free" and row["dtype"] in TABLE_DTYPES[row["path"]]:
                twin = ours.get(key(row | {"mode": "deterministic"}))
                lines.append(layer_line(result["device"], row, twin))
    lines += ["", f"Best peer: {peers.published()['label']}; {peers.published()['conditions']}."]
    return "\n".join(lines)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What distinguishes our own rows."""
    return tuple(row[name] for name in ("path", "dtype", "shape", "tokens", "mode"))


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    """By path and dtype, then in the order of the shapes, then by T."""
    return row["path"], row["dtype"], list(SHAPES).index(row["shape"]), row["tokens"]


def layer_line(device: str, row: dict[str, Any], twin: dict[str, Any] | None) -> str:
    """One line of the layer's table; `twin` is the same in deterministic mode."""
    peer = peers.best(row["shape"], row["tokens"], row["dtype"])
    cells = [
        device,
        row["path"],
        row["dtype"],
        row["shape"],
        str(row["tokens"]),
        f"{row['ms']:.4f}",
        f"{row['share_of_floor']:.0%}",
        f"{row['share_of_instruction']:.0%}" if row["bound"] == "compute" else "",
        "" if twin is None else f"{twin['share_of_floor']:.0%}",
        "" if peer is None else f"{peer[1]:.0%} {peer[0]}",
    ]
    return "| " + " | ".join(cells) + " |"


def ladder_table() -> str:
    """What each step of the product gains."""
    lines = ["| step | what changed | ms | TFLOP/s | gain |", "|---|---|---|---|---|"]
    for result in results.newest("ladder")[-1:]:
        for row in result["rows"]:
            lines.append(
                f"| {row['kernel']} | {row['change']} | {row['ms']:.3f} | {row['tflops']:.0f} | "
                f"{row['gain']:.2f} x |"
            )
        row = result["rows"][0]
        lines += ["", f"{row['shape']}, T = {row['tokens']}, {row['dtype']}: {origin(result)}."]
    return "\n".join(lines)


def counters_table() -> str:
    """What ncu counted."""
    measured = results.newest("ncu")[-1:]
    table = ncu.markdown(measured[0]["rows"] if measured else [])
    return f"{table}\n\nMixtral's layer: {origin(measured[0])}." if measured else table


def origin(result: dict[str, Any]) -> str:
    """Where a result comes from."""
    return f"{result['device']}, {result['date']}, commit {result['commit']}"


TABLES: dict[str, Callable[[], str]] = {
    "kernels": kernels_table,
    "moe_layer": moe_layer_table,
    "ladder": ladder_table,
    "counters": counters_table,
}
