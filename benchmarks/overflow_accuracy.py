"""What `--overflow` costs mixtral-lite in accuracy, and how level it makes the ranks.

    python benchmarks/overflow_accuracy.py

Real ranks over gloo, no replicas. The homes are as a launch lays them ("natural"), or each layer's
most popular experts lie together ("skewed"): the same answers, but far more that overflows. Every
rank reads its own windows of the held-out text, so many tokens a step; perplexity is of all of it.
`max_over_mean` is what the fullest rank computes over the mean that the gates asked for, mean over
steps and layers.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import write

from lightmoe.core import OverflowRule, SequenceStep
from lightmoe.distributed.communicator import Communicator, Rendezvous
from lightmoe.distributed.peers import gather_bytes
from lightmoe.layers.attention import KVCache
from lightmoe.models.checkpoint import read_index
from lightmoe.models.config import read_config
from lightmoe.models.decoder import Decoder, Parts, load_experts
from lightmoe.models.weights import SafetensorsReader
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.moe.overflow import Overflow
from lightmoe.moe.placement import Placement, RankKind, initial_placement
from lightmoe.server.tokenizer import Tokenizer
from lightmoe.worker.config import BLOCK_SIZE
from lightmoe.worker.inputs import step_inputs

MODEL = Path(__file__).resolve().parents[1] / "models" / "mixtral-lite"
CPU = torch.device("cpu")
TIMEOUT_SECONDS = 300.0


class Rank:
    """One rank's part of the model, under one placement."""

    def __init__(self, communicator: Communicator, placement: Placement, window: int) -> None:
        config = read_config(MODEL)
        read = SafetensorsReader(read_index(MODEL), torch.float32, CPU)
        self._communicator = communicator
        self._group = ExpertGroup(
            rank=communicator.rank,
            placement=placement,
            communicator=communicator,
            route="none",
            layer_pairs=np.zeros(len(config.moe_layers), dtype=np.int64),
            deterministic=False,
        )
        pool = load_experts(config, read, self._group, torch.float32, CPU)
        parts = Parts(config=config, read=read, group=self._group, pool=pool, deterministic=False)
        self._decoder = Decoder(parts, window)
        self._blocks = tuple(range(-(-window // BLOCK_SIZE)))
        shape = (config.num_hidden_layers, len(self._blocks), BLOCK_SIZE, *config.cache_shape)
        self._cache = KVCache(*shape, torch.float32, CPU)

    def run(
        self, windows: list[list[int]], rule: OverflowRule | None, tokens_per_step: int
    ) -> dict[str, Any]:
        """Read these windows; the row of all ranks, and the load [L, E] that the gates chose."""
        num_ranks = self._communicator.num_ranks
        overflow = None if rule is None else Overflow(rule, self._group, self._communicator)
        for layer in self._decoder.moe_layers:
            layer.overflow = overflow
        nats, moved, left, pairs, mean_pairs = 0.0, 0, 0, [], []
        num_positions = num_ranks * sum(len(window) - 1 for window in windows)
        for window in windows:
            for start, tokens in steps_of(window, tokens_per_step):
                self._group.tokens_per_rank = (len(tokens),) * num_ranks
                nats += self._nats(tokens, window[start + 1 : start + 1 + len(tokens)], start)
                pairs.append(self._group.layer_pairs.copy())
                self._group.layer_pairs[:] = 0
                mean_pairs.append(len(tokens) * self._decoder.num_experts_per_token)
                if overflow is not None:
                    step = overflow.take()
                    moved, left = moved + int(step.moved_pairs.sum()), left + step.num_left
        mine = np.array([nats, moved, *np.ravel(pairs)], dtype=np.float64)
        everyone = [np.frombuffer(b) for b in gather_bytes(self._communicator, mine.tobytes())]
        found = summary(np.stack(everyone), np.array(mean_pairs))
        load = self._decoder.load.take().tolist()
        return found | {"left_pairs": left, "load": load, "num_positions": num_positions}

    def _nats(self, tokens: list[int], wanted: list[int], start: int) -> float:
        sequence = SequenceStep(0, tuple(tokens), start, self._blocks)
        inputs = step_inputs([sequence], self._cache, self._decoder.rotary)
        hidden = self._decoder.forward(inputs.token_ids, inputs.attention)
        logits = self._decoder.logits(hidden).double()
        return float(
            torch.nn.functional.cross_entropy(logits, torch.tensor(wanted), reduction="sum")
        )


def steps_of(window: list[int], tokens_per_step: int) -> Iterator[tuple[int, list[int]]]:
    """Where each step begins in the window, and its tokens; the window's last is only predicted."""
    for start in range(0, len(window) - 1, tokens_per_step):
        yield start, window[:-1][start : start + tokens_per_step]


def summary(everyone: np.ndarray, mean_pairs: np.ndarray) -> dict[str, Any]:
    """From each rank's nats, moved pairs, and pairs computed by step and layer.

    `mean_pairs` [steps] are what the gates asked of a rank in the mean.
    """
    pairs = everyone[:, 2:].reshape(len(everyone), len(mean_pairs), -1)
    ratio = pairs.max(axis=0) / mean_pairs[:, None]
    return {
        "nats": float(everyone[:, 0].sum()),
        "moved_pairs": int(everyone[:, 1].sum()),
        "computed_pairs": int(pairs.sum()),
        "chosen_pairs": int(mean_pairs.sum()) * len(everyone) * pairs.shape[2],
        "max_over_mean": float(ratio.mean()),
        "max_over_mean_worst": float(ratio.max()),
    }


def placement_of(homes: np.ndarray, num_ranks: int) -> Placement:
    """One copy of each expert, at homes [L, E]."""
    slot_table = np.full((*homes.shape, num_ranks), -1, dtype=np.int32)
    used = [0] * num_ranks
    for layer, expert in np.ndindex(homes.shape):
        rank = int(homes[layer, expert])
        slot_table[layer, expert, rank] = used[rank]
        used[rank] += 1
    kinds: list[RankKind] = ["home"] * num_ranks
    return Placement(slot_table, homes.astype(np.int32), tuple(kinds))


def popular_together(load: np.ndarray, num_ranks: int) -> np.ndarray:
    """Homes [L, E] with the experts of most load [L, E] on the first rank, and so on."""
    order = np.argsort(-load, axis=1, kind="stable")
    homes = np.empty_like(order)
    ranks = np.arange(order.shape[1]) * num_ranks // order.shape[1]
    np.put_along_axis(homes, order, np.broadcast_to(ranks, order.shape), axis=1)
    return homes


def run_rank(rank: int, options: argparse.Namespace, port: int, out: Any) -> None:
    """One rank: every placement, step size and rule, in the same order everywhere."""
    torch.set_num_threads(1)
    communicator = Communicator(rank, options.ranks, port, TIMEOUT_SECONDS)
    windows = windows_of(options)[rank :: options.ranks]
    config = read_config(MODEL)
    layers, experts = len(config.moe_layers), config.num_experts
    placement = initial_placement(layers, experts, options.ranks)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for homes in ("natural", "skewed"):
            model = Rank(communicator, placement, options.window)
            for tokens in options.tokens:
                for rule in rules(options.factors):
                    found = model.run(windows, rule, tokens)
                    rows.append(row(homes, tokens, rule, found, rows))
                    if rule is None:
                        load = np.array(found["load"], dtype=np.int64)
                    if rank == 0:
                        print(rows[-1], flush=True)
            parts = gather_bytes(communicator, load.tobytes())
            loads = [np.frombuffer(part, dtype=np.int64).reshape(load.shape) for part in parts]
            homes_by_load = popular_together(np.sum(loads, axis=0), options.ranks)
            placement = placement_of(homes_by_load, options.ranks)
    if rank == 0:
        out.send_bytes(json.dumps(rows).encode())


def rules(factors: list[float]) -> Iterator[OverflowRule | None]:
    """None first: the others are compared to it."""
    yield None
    for factor in factors:
        yield OverflowRule("redirect", factor)
        yield OverflowRule("drop", factor)


def row(
    homes: str,
    tokens: int,
    rule: OverflowRule | None,
    found: dict[str, Any],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """One line of the result."""
    same = [one for one in rows if (one["homes"], one["tokens_per_rank"]) == (homes, tokens)]
    perplexity = math.exp(found["nats"] / found["num_positions"])
    return {
        "homes": homes,
        "tokens_per_rank": tokens,
        "overflow": "none" if rule is None else rule.mode,
        "capacity_factor": None if rule is None else rule.capacity_factor,
        "perplexity": perplexity,
        "perplexity_change": perplexity / (same[0]["perplexity"] if same else perplexity) - 1,
        "moved_share": found["moved_pairs"] / found["chosen_pairs"],
        "left_share": found["left_pairs"] / found["chosen_pairs"],
        "max_over_mean": found["max_over_mean"],
        "max_over_mean_worst": found["max_over_mean_worst"],
        "num_positions": found["num_positions"],
        "computed_pairs": found["computed_pairs"],
    }


def windows_of(options: argparse.Namespace) -> list[list[int]]:
    """Pieces of the held-out text, as many for every rank."""
    tokenizer = Tokenizer.from_folder(MODEL)
    assert tokenizer is not None, "mixtral-lite has one"
    text = tokenizer.encode((MODEL / "heldout.txt").read_text(encoding="utf-8"))
    starts = range(0, len(text) - options.window, options.window)
    windows = [list(text[start : start + options.window + 1]) for start in starts]
    most = min(len(windows), options.windows)
    return windows[: most - most % options.ranks]


def main() -> None:
    """Start the ranks and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=1000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 16])
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 1.1, 1.25, 1.5])
    options = parser.parse_args()
    rendezvous = Rendezvous(TIMEOUT_SECONDS)
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    ranks = [
        context.Process(target=run_rank, args=(rank, options, rendezvous.port, child))
        for rank in range(options.ranks)
    ]
    for process in ranks:
        process.start()
    child.close()  # so that the end of the last rank is the end of the pipe
    rows = json.loads(parent.recv_bytes())
    for process in ranks:
        process.join()
    write("overflow-accuracy", rows)


if __name__ == "__main__":
    main()
