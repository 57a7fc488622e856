"""How many experts are in their slots when a layer needs them, by ways to guess and to make room.

python benchmarks/bench_host_tier.py [--ranks 4] [--slots 3,4] [--sequences 1,16]

Counts only, of mixtral-lite's own routing of held-out text: ranks are threads here, and the copies
of a CPU say nothing of a card's.
"""

from __future__ import annotations

import argparse
import queue
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import protocol
from torch import Tensor

from lightmoe.core import HostTierCounts, ModelInfo, Request, RequestOutput, SamplingParams
from lightmoe.engine.engine import Engine, SchedulerConfig
from lightmoe.models.config import read_config
from lightmoe.models.find import find_model
from lightmoe.moe.dispatch.collective import CollectiveDispatcher
from lightmoe.moe.residency import Key, Residency, SlotCache
from lightmoe.server.tokenizer import Tokenizer
from lightmoe.worker.config import WorkerConfig
from lightmoe.worker.local_group import LocalWorkerGroup
from lightmoe.worker.sizing import Demand, size_ranks

PROMPT_TOKENS, ANSWER_TOKENS, NUM_PROMPTS = 40, 60, 16


def least_recently_used(cache: SlotCache, _: int, keep: Collection[Key]) -> Key | None:
    """Of all layers alike."""
    keys = [(layer, expert) for layer, slots in enumerate(cache._slots) for expert in slots]
    return min((key for key in keys if key not in keep), key=lambda key: cache._used.get(key, 0))


def nothing_ahead(residency: Residency, layer: int, needed: object, wanted: object) -> None:
    """No guess."""


def own_tokens_only(dispatcher: CollectiveDispatcher, choice: Any, num_chunks: int) -> Any:
    """The guess of this rank's own tokens: those of others are blotted out."""
    group, route = dispatcher._group, CollectiveDispatcher.plain_route  # type: ignore[attr-defined]
    residency = group.residency
    assert residency is not None
    first = sum(group.tokens_per_rank[: group.rank])
    own = slice(first, first + group.tokens_per_rank[group.rank])

    def enter(layer: int, everyone: Tensor, num_chosen: int) -> None:
        blotted = everyone.clone()
        blotted[:, num_chosen:] = -1
        blotted[own] = everyone[own]
        Residency.enter(residency, layer, blotted, num_chosen)

    with patch.object(residency, "enter", enter):
        return route(dispatcher, choice, num_chunks)


@contextmanager
def variant(name: str) -> Iterator[None]:
    """One of VARIANTS."""
    with patch.object(CollectiveDispatcher, "plain_route", CollectiveDispatcher.route, create=True):
        if name.startswith("no guess"):
            with patch.object(Residency, "_fetch_ahead", nothing_ahead):
                if name == "no guess, least recently used":
                    with patch.object(SlotCache, "_next_to_go", least_recently_used):
                        yield
                else:
                    yield
        elif name == "own tokens":
            with patch.object(CollectiveDispatcher, "route", own_tokens_only):
                yield
        else:
            yield


VARIANTS = ("no guess, least recently used", "no guess", "own tokens", "all ranks' tokens")
"""The last is what ranks do."""


def counts_of(
    config: WorkerConfig, prompts: Sequence[Sequence[int]], max_num_seqs: int
) -> HostTierCounts:
    """Answer all prompts, and what the host tier did for that."""
    model = config.model
    info = ModelInfo(
        name="mixtral-lite",
        folder=str(config.folder),
        architecture=model.architecture,
        num_layers=len(model.moe_layers),
        num_experts=model.num_experts,
        vocab_size=model.vocab_size,
        max_model_len=config.max_model_len,
        eos_token_ids=(),
        generation_defaults={},
    )
    limits = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=512)
    engine = Engine(info, LocalWorkerGroup(config), limits)
    ended: queue.Queue[RequestOutput] = queue.Queue()
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.7, seed=number, max_tokens=ANSWER_TOKENS)
        request = Request(request_id=str(number), prompt_token_ids=tuple(prompt), params=params)
        engine.submit(request, on_end(ended))
    engine.start()
    try:
        for _ in prompts:
            ended.get(timeout=600)
        counts = engine.stats().host_tier
    finally:
        engine.close()
    assert counts is not None
    return counts


def on_end(ended: queue.Queue[RequestOutput]) -> Callable[[RequestOutput], None]:
    """Passes on a request's last output."""

    def take(output: RequestOutput) -> None:
        if output.finish_reason is not None:
            ended.put(output)

    return take


def new_config(num_ranks: int, expert_slots: int, max_num_seqs: int) -> WorkerConfig:
    """What a launch would tell its ranks."""
    folder = find_model("mixtral-lite")
    model = read_config(folder)
    sizing = size_ranks(
        Demand(
            model=model,
            num_ranks=num_ranks,
            num_spares=0,
            element_bytes=4,
            rank_bytes=1 << 30,
            max_model_len=PROMPT_TOKENS + ANSWER_TOKENS,
            max_num_seqs=max_num_seqs,
            on_cpu=True,
            expert_slots=expert_slots,
        )
    )
    return WorkerConfig(
        model=model,
        folder=folder,
        load_format="auto",
        placement=sizing.placement,
        route="waterfill",
        device="cpu",
        dtype="float32",
        max_model_len=sizing.max_model_len,
        num_kv_blocks=sizing.num_kv_blocks,
        num_threads=1,
        seed=0,
        expert_slots=expert_slots,
    )


def main() -> None:
    """Count and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--slots", default="3,4")
    parser.add_argument("--sequences", default="4,16", help="at once, over all ranks")
    options = parser.parse_args()
    folder = find_model("mixtral-lite")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    ids = tokenizer.encode((folder / "heldout.txt").read_text(encoding="utf-8")[:60_000])
    starts = np.random.default_rng(1).integers(0, len(ids) - PROMPT_TOKENS, NUM_PROMPTS)
    prompts = [ids[start : start + PROMPT_TOKENS] for start in starts.tolist()]
    rows = []
    for slots in map(int, options.slots.split(",")):
        for num_sequences in map(int, options.sequences.split(",")):
            each = -(-num_sequences // options.ranks)
            for name in VARIANTS:
                config = new_config(options.ranks, slots, each)
                with variant(name):
                    counts = counts_of(config, prompts, each)
                needed = counts.num_hits + counts.num_misses
                blob_bytes = config.model.expert_elements * 4
                row = {
                    "num_ranks": options.ranks,
                    "slots_per_rank": slots,
                    "num_sequences": each * options.ranks,
                    "variant": name,
                    "num_needed": needed,
                    "hit_rate": round(counts.hit_rate, 4),
                    "fetched_per_needed": round(counts.fetched_bytes / blob_bytes / needed, 3),
                }
                print(row)
                rows.append(row)
    protocol.write("host-tier", rows)


if __name__ == "__main__":
    main()
