"""What sums at the expert's rank, and int8 between ranks, cost mixtral-lite in accuracy.

    python benchmarks/payload_accuracy.py

Ranks are made up: one process has all experts, and rounds what would travel between ranks as the
kernels of transport copy_engine do. So the numbers are of the arithmetic, not of a machine.
Perplexity and the most likely token are of held-out text; greedy answers run freely from prompts of
the same text.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import write
from torch import Tensor

from lightmoe.core import SequenceStep
from lightmoe.kernels import reference
from lightmoe.layers.attention import KVCache
from lightmoe.models.checkpoint import read_index
from lightmoe.models.config import read_config
from lightmoe.models.decoder import Decoder, Parts, load_experts
from lightmoe.models.weights import SafetensorsReader
from lightmoe.moe.dispatch import Dispatcher, ExpertGroup, LocalDispatcher, Receipt
from lightmoe.moe.gate import Choice, PairSort
from lightmoe.moe.layer import MoELayer
from lightmoe.moe.placement import initial_placement
from lightmoe.server.tokenizer import Tokenizer
from lightmoe.worker.config import BLOCK_SIZE
from lightmoe.worker.inputs import step_inputs

MODEL = Path(__file__).resolve().parents[1] / "models" / "mixtral-lite"
CPU = torch.device("cpu")


def as_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows [N, D]."""
    return reference.permute_int8(rows, torch.arange(len(rows)))


class SummingDispatcher(Dispatcher):
    """Experts of one process as if they were on ranks that give sums, as they are or as int8."""

    def __init__(self, inner: LocalDispatcher, homes: Tensor, int8: bool) -> None:
        self.pair_sort: PairSort | None = None  # the choice itself is needed
        self._inner, self._homes, self._int8 = inner, homes, int8
        self._target = homes[:0, None]

    def route(self, choice: Choice, num_chunks: int) -> Sequence[Receipt]:
        """One chunk, and the rank that each pair goes to [T, K]."""
        assert num_chunks == 1, "nothing to overlap here"
        self._target = self._homes[choice.experts.long()]
        return self._inner.route(choice, num_chunks)

    def dispatch(self, hidden: Tensor, receipt: Receipt) -> Tensor:
        """The rows as they arrive [T, D]."""
        rows = self._inner.dispatch(hidden, receipt)
        return reference.dequantize_rows(*as_int8(rows), rows.dtype) if self._int8 else rows

    def combine(self, pairs: Tensor, weights: Tensor, receipt: Receipt) -> Tensor:
        """Sums of a token's weighted results, rank by rank, as they arrive, summed [T, D]."""
        assert receipt.pair_index is not None
        results = pairs[receipt.pair_index.long()].float()  # [T, K, D]
        total = torch.zeros_like(results[:, 0])
        for rank in range(int(self._homes.max()) + 1):
            here = self._target == rank
            part = torch.zeros_like(total)
            for k in range(results.shape[1]):
                part = torch.where(here[:, k, None], part + results[:, k], part)
            if self._int8:
                codes, scales = as_int8(part)
                part = scales[:, None] * codes.float()
            else:
                part = part.to(pairs.dtype).float()
            total = torch.where(here.any(dim=1, keepdim=True), total + part, total)
        return total.to(pairs.dtype)


class Model:
    """mixtral-lite with one exchange or another."""

    def __init__(self, dtype: torch.dtype, max_tokens: int) -> None:
        self.config = read_config(MODEL)
        read = SafetensorsReader(read_index(MODEL), dtype, CPU)
        config = self.config
        self._group = ExpertGroup(
            rank=0,
            placement=initial_placement(len(config.moe_layers), config.num_experts, 1),
            communicator=None,
            route="none",
            layer_pairs=np.zeros(len(config.moe_layers), dtype=np.int64),
        )
        pool = load_experts(config, read, self._group, dtype, CPU)
        self.decoder = Decoder(
            Parts(config=config, read=read, group=self._group, pool=pool), max_tokens
        )
        self._blocks = tuple(range(-(-max_tokens // BLOCK_SIZE)))
        self._cache = KVCache(
            config.num_hidden_layers, len(self._blocks), BLOCK_SIZE, *config.cache_shape, dtype, CPU
        )

    def exchange_over(self, num_ranks: int, payload: str) -> None:
        """As if its experts were on so many ranks; "exact": every result travels as it is."""
        layers, experts = len(self.config.moe_layers), self.config.num_experts
        copies = initial_placement(layers, experts, num_ranks).copies
        self._group.deterministic = payload == "exact"
        for layer in self.decoder.moe_layers:
            inner = self._local(layer)
            homes = torch.tensor([ranks[0] for ranks in copies[layer.layer]])
            layer.dispatcher = (
                inner if payload == "exact" else SummingDispatcher(inner, homes, payload == "int8")
            )

    def _local(self, layer: MoELayer) -> LocalDispatcher:
        return LocalDispatcher(self._group, layer.layer, CPU, layer.experts.tokens_per_tile)

    def logits(self, token_ids: Sequence[int], start: int = 0) -> Tensor:
        """Of the tokens from `start` on, after those that ran before: [T, vocabulary]."""
        sequence = SequenceStep(0, tuple(token_ids), start, self._blocks)
        inputs = step_inputs([sequence], self._cache, self.decoder.rotary)
        return self.decoder.logits(self.decoder.forward(inputs.token_ids, inputs.attention))

    def answer(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The greedy continuation."""
        tokens = [int(self.logits(prompt)[-1].argmax())]
        while len(tokens) < num_tokens:
            start = len(prompt) + len(tokens) - 1
            tokens.append(int(self.logits(tokens[-1:], start)[-1].argmax()))
        return tokens


def run(model: Model, windows: list[list[int]], options: argparse.Namespace) -> dict[str, Any]:
    """Negative log likelihood and most likely token of each position, greedy answers."""
    nats, likely, answers = 0.0, [], []
    for window in windows:
        logits = model.logits(window[:-1])
        wanted = torch.tensor(window[1:])
        nats += float(torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="sum"))
        likely.append(logits.argmax(dim=1))
    for window in windows[: options.answers]:
        answers.append(model.answer(window[: options.prompt_tokens], options.answer_tokens))
    return {"nats": nats, "likely": torch.cat(likely), "answers": answers}


def equal_beginning(first: list[int], second: list[int]) -> int:
    """How many tokens two answers have in common before they part."""
    pairs = zip(first, second, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(first))


def compared(found: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """The row of one exchange beside the exact one."""
    both = list(zip(found["answers"], exact["answers"], strict=True))
    equal = [equal_beginning(*answers) for answers in both]
    return {
        "num_positions": len(found["likely"]),
        "perplexity": math.exp(found["nats"] / len(found["likely"])),
        "same_likely_token": float((found["likely"] == exact["likely"]).double().mean()),
        "num_answers": len(both),
        "answers_equal": sum(first == second for first, second in both),
        "mean_equal_tokens": sum(equal) / max(1, len(equal)),
    }


@torch.inference_mode()
def main() -> None:
    """Run every exchange over the held-out text and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=1000)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=64)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_folder(MODEL)
    assert tokenizer is not None, "mixtral-lite has one"
    text = tokenizer.encode((MODEL / "heldout.txt").read_text(encoding="utf-8"))
    starts = range(0, len(text) - 1, options.window)
    windows = [list(text[start : start + options.window + 1]) for start in starts]
    windows = [window for window in windows if len(window) == options.window + 1]
    windows = windows[: options.windows]
    model = Model(getattr(torch, options.dtype), options.window)
    rows, exact = [], None
    for num_ranks, payload in ((8, "exact"), (4, "full"), (8, "int8"), (4, "int8"), (2, "int8")):
        model.exchange_over(num_ranks, payload)
        found = run(model, windows, options)
        exact = exact or found
        row = {"payload": payload, "num_ranks": num_ranks, "dtype": options.dtype}
        rows.append(row | compared(found, exact))
        print(rows[-1], flush=True)
    write("payload-accuracy", rows)


if __name__ == "__main__":
    main()
