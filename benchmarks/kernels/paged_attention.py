"""Attention over a paged KV cache: decoding sequences, and prompts, beside SDPA on gathered pages.

    python benchmarks/kernels/paged_attention.py [--shapes mixtral] [--lengths 1024 8192]

The peer is memory-efficient SDPA over keys and values that already lie in order, copied to every
query head of a prompt: what gathering and copying take is not counted. The floor of a decode is the
bytes of its keys and values, of a prompt the rate of mma.sync over what the mask leaves.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ceilings
import results
import torch
from ceilings import Ceilings
from floors import path_of
from row_stems import num_sets
from timing import time_graph
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lightmoe.kernels import paged_attention, reference
from lightmoe.kernels.library import using

BLOCK_SIZE = 16
ERROR_LIMIT = 1.2e-2
NUM_DECODES = 32
INSTRUCTION = "bfloat_k16"


@dataclass(frozen=True)
class Heads:
    """Attention of a model: query heads, KV heads and their width; latents are their own values."""

    queries: int
    shared: int
    width: int
    latent: bool = False


HEADS = {
    "mixtral": Heads(32, 8, 128),
    "qwen3": Heads(32, 4, 128),
    "dsv2lite": Heads(16, 1, 576, latent=True),
}


@dataclass(frozen=True)
class Cache:
    """Pages in random order, and `num_sequences` tables of sequences of `length` positions."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor

    @classmethod
    def random(cls, heads: Heads, num_sequences: int, length: int) -> Cache:
        """Of normal rows."""
        per_sequence = -(-length // BLOCK_SIZE)
        shape = (num_sequences * per_sequence, BLOCK_SIZE, heads.shared, heads.width)
        keys = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        values = keys if heads.latent else torch.randn_like(keys)
        tables = torch.randperm(shape[0], device="cuda").int().view(num_sequences, per_sequence)
        lengths = torch.full((num_sequences,), length, device="cuda", dtype=torch.int32)
        return cls(keys, values, tables, lengths)

    def call(self, query: Tensor, max_queries: int) -> Callable[[], Tensor]:
        """Attention of `max_queries` queries of each sequence."""
        starts = max_queries * torch.arange(len(self.tables) + 1, device="cuda").int()
        cache = (self.keys, self.values, self.tables, starts, self.lengths)
        return functools.partial(paged_attention, query, *cache, max_queries=max_queries)

    def in_order(self, pages: Tensor, length: int) -> Tensor:
        """[sequences, KV heads, length, width]."""
        return pages[self.tables].flatten(1, 2)[:, :length].transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Problem:
    """Calls of ours and of the peer on several sets of inputs, and what bounds them."""

    kernel: str
    calls: Sequence[Callable[[], Tensor]]
    peer: Sequence[Callable[[], Tensor]]
    floor_ms: float
    bound: str


def decodes(heads: Heads, length: int, measured: Ceilings) -> Problem:
    """One query of each of 32 sequences."""
    one = heads.shared * heads.width * 2 * (1 if heads.latent else 2)
    num_bytes = NUM_DECODES * length * one
    calls, peer = [], []
    for _ in range(min(3, num_sets(num_bytes, measured.l2_bytes))):
        cache = Cache.random(heads, NUM_DECODES, length)
        query = torch.randn(NUM_DECODES, heads.queries, heads.width, device="cuda").bfloat16()
        calls.append(cache.call(query, 1))
        ordered = [cache.in_order(pages, length) for pages in (cache.keys, cache.values)]
        grouped = query.unflatten(1, (heads.shared, -1))
        peer.append(functools.partial(scaled_dot_product_attention, grouped, *ordered))
    floor_ms = 1e3 * num_bytes / measured.bandwidth
    return Problem(f"decode B={NUM_DECODES}", calls, peer, floor_ms, "memory")


def prompt(heads: Heads, length: int, measured: Ceilings) -> Problem:
    """A whole prompt."""
    cache = Cache.random(heads, 1, length)
    query = torch.randn(length, heads.queries, heads.width, device="cuda").bfloat16()
    group = heads.queries // heads.shared
    keys, values = (
        cache.in_order(pages, length).repeat_interleave(group, dim=1)
        for pages in (cache.keys, cache.values)
    )
    by_head = query.transpose(0, 1).unsqueeze(0).contiguous()
    peer = functools.partial(scaled_dot_product_attention, by_head, keys, values, is_causal=True)
    flop = 2 * heads.queries * heads.width * length * (length + 1)
    floor_ms = 1e3 * flop / measured.rate(INSTRUCTION)
    return Problem("prompt", [cache.call(query, length)], [peer], floor_ms, "compute")


def error_of(call: Callable[[], Tensor]) -> float:
    """The largest relative error of an output row of the first sequence's last 64 queries."""
    assert isinstance(call, functools.partial)
    query, keys, values, tables, starts, lengths = call.args
    end = int(starts[1])
    rows = slice(max(0, end - 64), end)
    wanted = reference.paged_attention(
        query[rows].double(), keys.double(), values.double(),
        tables[:1], starts.new_tensor([0, end - rows.start]), lengths[:1],
    )  # fmt: skip
    return float(((call()[rows] - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def measure(name: str, length: int, arguments: argparse.Namespace, measured: Ceilings) -> list[Any]:
    """The rows of one shape and length: ours, then the peer's."""
    rows = []
    for make in (decodes, prompt):
        problem = make(HEADS[name], length, measured)
        error = error_of(problem.calls[0])
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            for impl, calls in (("lightmoe", problem.calls), ("torch SDPA", problem.peer)):
                timing = time_graph(calls, arguments.seconds_per_row)
                rows.append(
                    {
                        "shape": name,
                        "tokens": length,
                        "dtype": "bf16",
                        "routing": "",
                        "mode": "deterministic",
                        "impl": impl,
                        "path": path_of(arguments.arch, measured.capability),
                        "kernel": problem.kernel,
                        **asdict(timing),
                        "floor_ms": problem.floor_ms,
                        "bound": problem.bound,
                    }
                )
                print(line(rows[-1]), flush=True)
        ours, theirs = rows[-2:]
        ours |= {
            "share_of_floor": problem.floor_ms / ours["ms"],
            "speedup": theirs["ms"] / ours["ms"],
            "error": error,
            "correct": error <= ERROR_LIMIT,
        }
        print(f"  {ours['speedup']:.2f} times as fast, error {error:.1e}", flush=True)
        torch.cuda.empty_cache()
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    return (
        f"{row['shape']:9}M={row['tokens']:<6}{row['kernel']:13}{row['impl']:11}"
        f"{1e3 * row['ms']:10.1f} us  floor {row['floor_ms'] / row['ms']:6.1%} ({row['bound']})"
    )


def main() -> int:
    """Measure, print and write the rows; 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--arch", help="folder of kernels, such as 80ptx; the card's by default")
    parser.add_argument("--seconds-per-row", type=float, default=0.1)
    parser.add_argument("--commit", help="of a copy without .git")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    commit = results.commit(arguments.commit)
    measured = ceilings.measure()
    print(measured.summary())
    rows: list[dict[str, Any]] = []
    with using(architecture=arguments.arch):
        for name in arguments.shapes:
            for length in arguments.lengths:
                rows += measure(name, length, arguments, measured)
    results.write("paged_attention", rows, measured.to_json(), commit, arguments.out)
    return 0 if all(row.get("correct", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
