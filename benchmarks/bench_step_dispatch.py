"""How long a step takes that has no work: plans out to idle ranks and results back.

python benchmarks/bench_step_dispatch.py [--gpus 10] [--model mixtral-lite]
"""

from __future__ import annotations

import argparse
import time

import protocol

from lightmoe.config import LaunchConfig
from lightmoe.core import Batch
from lightmoe.launch import start_workers


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=10)
    parser.add_argument("--model", default="mixtral-lite")
    parser.add_argument("--samples", type=int, default=300)
    options = parser.parse_args()
    config = LaunchConfig(model=options.model, gpus=options.gpus, device="cpu")
    workers = start_workers(config, progress=lambda stage, done, total: None).group
    batches = [Batch(0, (0,) * options.gpus)] * options.gpus

    def idle_step() -> float:
        time.sleep(0.01)  # the ranks are idle: asleep, not spinning
        started = time.perf_counter()
        workers.begin(batches)
        workers.finish()
        return (time.perf_counter() - started) * 1e3

    try:
        row = {
            "num_ranks": options.gpus,
            "step_ms": protocol.measure(idle_step, 20, options.samples),
        }
    finally:
        workers.close()
    print(row)
    protocol.write("step-dispatch", [row])


if __name__ == "__main__":
    main()
