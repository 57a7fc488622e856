"""A launch as a user does it: time to ready, memory, idle load, tokens/s and time to first token.

python benchmarks/bench_launch.py [--gpus 10] [--model mixtral-lite]

Flags that are not its own go to `lightmoe launch`: --device cuda --load-format dummy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import processes
import protocol

PROMPTS: dict[str, str | list[int]] = {
    "text": "def fibonacci(n):",
    "ids": list(range(100, 116)),  # for a model without a tokenizer
}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=10)
    parser.add_argument("--model", default="mixtral-lite")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--idle-seconds", type=float, default=20.0)
    parser.add_argument("--prompt", choices=sorted(PROMPTS), default="text")
    parser.add_argument("--gpu", help="the card's name, where one is measured")
    parser.add_argument("--commit", help="the commit, where this is a copy without .git")
    options, flags = parser.parse_known_args()
    with launched(options.model, options.gpus, flags) as (server, url, ready_seconds):
        rows: list[dict[str, Any]] = [
            {"what": "ready", "num_ranks": options.gpus, "seconds": ready_seconds},
            idle_row(server.pid, options.idle_seconds),
        ]
        for streams in options.streams:
            rows.append(
                throughput_row(
                    url,
                    {"model": options.model, "prompt": PROMPTS[options.prompt]},
                    streams,
                    options.tokens,
                    options.samples,
                )
            )
        rows.append(memory_row(server.pid))
        started = time.perf_counter()
        server.send_signal(signal.SIGINT)
        code = server.wait(timeout=30)
        rows.append({"what": "stop", "seconds": time.perf_counter() - started, "exit_code": code})
    for row in rows:
        print(json.dumps(row))
    bench = "launch" if options.gpu is None else f"launch-{options.model}"
    protocol.write(bench, rows, gpu=options.gpu, measured_commit=options.commit)


@contextlib.contextmanager
def launched(
    model: str, gpus: int, flags: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], str, float]]:
    """`lightmoe launch` in a process of its own, its address, and how long it took to answer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lightmoe", "launch", "--gpus", str(gpus), "--model", model]
    started = time.perf_counter()
    server = subprocess.Popen([*command, "--port", str(port), *flags])
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if server.poll() is not None:
                sys.exit(f"lightmoe launch ended with {server.returncode}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health").status_code == 200:
                    break
            time.sleep(0.05)
        yield server, url, time.perf_counter() - started
    finally:
        if server.poll() is None:
            server.kill()


def idle_row(pid: int, seconds: float) -> dict[str, Any]:
    """Processor time while nobody asks for anything, as a share of one core."""
    time.sleep(3)
    before = {process.pid: process for process in processes.tree(pid)}
    time.sleep(seconds)
    used = [
        (process, process.cpu_seconds - before[process.pid].cpu_seconds)
        for process in processes.tree(pid)
        if process.pid in before
    ]
    return {
        "what": "idle",
        "ranks_core_share": sum(cpu for process, cpu in used if process.is_rank) / seconds,
        "server_core_share": sum(cpu for process, cpu in used if process.pid == pid) / seconds,
        "all_core_share": sum(cpu for _, cpu in used) / seconds,
    }


def memory_row(pid: int) -> dict[str, Any]:
    """Proportional set sizes after the load."""
    all_processes = processes.tree(pid)
    return {
        "what": "memory",
        "ranks_bytes": sum(process.pss_bytes for process in all_processes if process.is_rank),
        "all_bytes": sum(process.pss_bytes for process in all_processes),
        "num_processes": len(all_processes),
    }


def throughput_row(
    url: str, request: dict[str, Any], streams: int, tokens: int, samples: int
) -> dict[str, Any]:
    """Tokens/s of parallel streams, and the first content's delay."""
    runs = [asyncio.run(run_streams(url, request, streams, tokens)) for _ in range(samples + 1)][1:]
    return {
        "what": "throughput",
        "num_streams": streams,
        "tokens_per_stream": tokens,
        "tokens_per_second": protocol.spread([rate for rate, _ in runs]),
        "first_token_ms": protocol.spread([first for _, firsts in runs for first in firsts]),
    }


async def run_streams(
    url: str, request: dict[str, Any], streams: int, tokens: int
) -> tuple[float, list[float]]:
    """One run: tokens/s in all, and each stream's time to first content in ms."""
    body = request | {
        "max_tokens": tokens,
        "temperature": 0.8,
        "ignore_eos": True,
        "stream": True,
    }
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        started = time.perf_counter()
        firsts = await asyncio.gather(
            *(run_stream(client, body | {"seed": i}) for i in range(streams))
        )
        return streams * tokens / (time.perf_counter() - started), list(firsts)


async def run_stream(client: httpx.AsyncClient, body: dict[str, Any]) -> float:
    """One stream to its end; time to its first content in ms."""
    started, first = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not first and line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                if choice["text"] or choice.get("token_ids"):
                    first = (time.perf_counter() - started) * 1e3
    return first


if __name__ == "__main__":
    main()
