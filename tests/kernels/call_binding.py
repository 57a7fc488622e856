"""Calls the binding in a folder, as a JSON list on stdin says, and prints each answer as a line.

A script of its own: which libcuda.so.1 a process sees is decided when it starts.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import threading
from pathlib import Path


def main() -> None:
    path = next(Path(sys.argv[1]).glob("_light_ops*.so"))
    loader = importlib.machinery.ExtensionFileLoader("_light_ops", str(path))
    spec = importlib.util.spec_from_file_location("_light_ops", path, loader=loader)
    binding = importlib.util.module_from_spec(spec)
    loader.exec_module(binding)
    for name, positional, named in json.load(sys.stdin):
        if name == "in threads":
            call_in_threads(binding, *positional)
            continue
        answer = getattr(binding, name)(*map(as_tuple, positional), **with_tuples(named))
        failed = isinstance(answer, int) and answer and name != "driver_version"
        print(f"{name}: {answer}{' ' + binding.last_error() if failed else ''}", flush=True)


def as_tuple(value: object) -> object:
    """JSON knows lists only."""
    return tuple(value) if isinstance(value, list) else value


def with_tuples(named: dict[str, object]) -> dict[str, object]:
    return {name: as_tuple(value) for name, value in named.items()}


def call_in_threads(binding: object, num_threads: int, named: dict) -> None:
    """The same product from many threads at once, each of which binds the device first."""
    named = with_tuples(named)
    start, answers = threading.Barrier(num_threads), []

    def call() -> None:
        binding.bind_device(0)
        start.wait()
        answers.append(binding.grouped_gemm(**named))

    threads = [threading.Thread(target=call) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"in threads: {sorted(set(answers))}", flush=True)


if __name__ == "__main__":
    main()
