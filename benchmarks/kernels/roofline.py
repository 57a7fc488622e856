"""Rooflines of the cards: each measured layer against what its card reaches, as PNG.

    python benchmarks/kernels/roofline.py              # draw what benchmarks/results holds
    python benchmarks/kernels/roofline.py --measure    # on the card itself: measure first

Until an RTX 2080 Ti has been measured its picture holds predictions, and says so. --measure on
that card writes its result file, and from then on the picture holds what it measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import results
from floors import SHAPES, Work, expected_active, layer_work

PREDICTED_CARD = "NVIDIA GeForce RTX 2080 Ti"
# NVIDIA's Turing white paper: 616 GB/s; 68 SMs x 512 FMA a clock at 1545 MHz = 107.6 TFLOP/s of
# fp16 products summed in fp16, and half of that summed in fp32. Predictions scale the bandwidth by
# what a copy reaches of the nominal one on the measured card.
PREDICTED_BANDWIDTH = 616e9
PREDICTED_RATES = {"half_k8": 53.8e12, "half_k8_half": 107.6e12}
NOMINAL_BANDWIDTHS = {"NVIDIA H100 80GB HBM3": 3.352e12, "NVIDIA H200": 4.8e12}
KERNEL_BENCHES = ("grouped_gemm", "quant_gemm")
MEASURED_ROWS = ("--dtypes", "fp16", "int4", "--impls", "lightmoe")


def main() -> int:
    """Draw, after measuring where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--measure", action="store_true", help="run moe_layer.py here first")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of results")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the pictures")
    arguments = parser.parse_args()
    if arguments.measure:
        layer = Path(__file__).with_name("moe_layer.py")
        command = [sys.executable, str(layer), "--shapes", *arguments.shapes, *MEASURED_ROWS]
        done = subprocess.run([*command, "--out", str(arguments.results)], check=False)
        if done.returncode:
            return done.returncode
    from figures import draw_roofline

    measured = results.newest("moe_layer", arguments.results)
    if not measured:
        print(f"no moe_layer result in {arguments.results}: run moe_layer.py on a card first")
        return 1
    for result in measured:
        roofline = roofline_of(result, kernel_points(result["device"], arguments.results))
        print(draw_roofline(roofline, arguments.out))
    if all(result["device"] != PREDICTED_CARD for result in measured):
        prediction = predict(measured)
        if prediction is not None:
            print(draw_roofline(prediction, arguments.out))
    return 0


def roofline_of(result: dict[str, Any], kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """A measured card's roofs and points: {device, predicted, bandwidth, rates, points}."""
    ceilings = result["ceilings"]
    libraries = {f"library {name}": rate for name, rate in ceilings["matmul"].items()}
    return {
        "device": result["device"],
        "predicted": False,
        "note": f"measured {result['date']}",
        "bandwidth": max(ceilings["read"], ceilings["copy"]),
        "rates": {**ceilings["instruction"], **libraries},
        "points": [point(row, row["ms"]) for row in ours(result)] + kernels,
    }


def kernel_points(device: str, folder: Path) -> list[dict[str, Any]]:
    """A card's points of single kernels, from its other results."""
    points = []
    for bench in KERNEL_BENCHES:
        for result in results.newest(bench, folder):
            if result["device"] == device:
                points += [
                    {
                        "kernel": bench,
                        "dtype": row["dtype"],
                        "intensity": row["intensity"],
                        "rate": 1e12 * row["tflops"],
                    }
                    for row in result["rows"]
                ]
    return points


def ours(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Our own rows of uniform routing in free mode."""
    wanted = {"impl": "lightmoe", "routing": "uniform", "mode": "free"}
    return [row for row in result["rows"] if all(row[k] == v for k, v in wanted.items())]


def point(row: dict[str, Any], ms: float) -> dict[str, Any]:
    """Where a layer lies: its FLOP per byte and its FLOP per second."""
    work = work_of(row)
    return {
        "kernel": "layer",
        "dtype": row["dtype"],
        "intensity": work.intensity,
        "rate": work.flops / (1e-3 * ms),
    }


def work_of(row: dict[str, Any]) -> Work:
    """The layer's work with the experts that were active."""
    shape = SHAPES[row["shape"]]
    active = row.get("active_experts") or expected_active(shape, row["tokens"])
    return layer_work(shape, row["tokens"], active, row["dtype"])


def predict(measured: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The 2080 Ti's points from the sm_75 path's rows on the newest card that has them.

    time = max(FLOPs / instruction rate, bytes / bandwidth) / s, where s is what the same row
    reaches of the same maximum on the measured card, with that card's measured m16n8k8 rate and
    bandwidth. None without such rows. What differs between the cards (SMs, L2, shared memory,
    issue rates) is not in the model.
    """
    for result in reversed(measured):
        rows = [row for row in ours(result) if row["path"] == "sm75"]
        nominal = NOMINAL_BANDWIDTHS.get(result["device"])
        if rows and nominal:
            break
    else:
        return None
    ceilings = result["ceilings"]
    bandwidth = PREDICTED_BANDWIDTH * max(ceilings["read"], ceilings["copy"]) / nominal
    points = [
        point(row, predicted_ms(row, ceilings, PREDICTED_RATES["half_k8"], bandwidth))
        for row in rows
    ]
    return {
        "device": PREDICTED_CARD,
        "predicted": True,
        "note": f"predicted, not measured: from {result['device']}, {result['date']}",
        "bandwidth": bandwidth,
        "rates": PREDICTED_RATES,
        "points": points,
    }


def predicted_ms(
    row: dict[str, Any], ceilings: dict[str, Any], rate: float, bandwidth: float
) -> float:
    """The row's time on a card of that FLOP/s and those bytes/s, by the model of predict."""
    work = work_of(row)
    here = max(
        work.flops / ceilings["instruction"][row["instruction"]],
        work.num_bytes / max(ceilings["read"], ceilings["copy"]),
    )
    share = min(1.0, here / (1e-3 * row["ms"]))
    return float(1e3 * max(work.flops / rate, work.num_bytes / bandwidth) / share)


if __name__ == "__main__":
    sys.exit(main())
