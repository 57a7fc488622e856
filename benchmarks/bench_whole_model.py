"""A whole model with made-up weights over the cards of this machine: prompts and decoding.

    python benchmarks/bench_whole_model.py --model mixtral-8x7b --ranks 4 --overlap auto

prefill: 128 prompts of 1024 tokens, one token each, from the first submit to the last answer;
first: one such prompt on an idle engine; decode: the difference of two runs that differ in 64
tokens of every answer. All of it in process, the scheduler and the sampler included.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import protocol

from lightmoe import LLM, SamplingParams
from lightmoe.machine import read_driver
from lightmoe.models.config import read_config
from lightmoe.models.find import find_model

PROMPT_TOKENS = 1024
NUM_PROMPTS = 128
DECODED = (16, 80)


def main() -> None:
    """Start the model once for each kind of overlap and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mixtral-8x7b")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--overlap", nargs="+", default=["auto"])
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument(
        "--routing-skew", help='"uniform" or "zipf:1.0", not the choice of made-up routers'
    )
    parser.add_argument("--commit", help="the commit that is measured, where git does not know")
    options = parser.parse_args()
    vocab_size = read_config(find_model(options.model)).vocab_size
    rows = []
    for overlap in options.overlap:
        with LLM(
            options.model,
            gpus=options.ranks,
            device="cuda",
            load_format="dummy",
            placement="spread",
            transport=options.transport,
            overlap=overlap,
            routing_skew=options.routing_skew,
            max_num_batched_tokens=8192,
            max_num_seqs=64,
            max_model_len=2048,
            rebalance_interval=0,
            free_slots=0,
        ) as llm:
            row = {"model": options.model, "ranks": options.ranks, "overlap": overlap}
            row |= {"summary": llm.summary} | measure(llm, vocab_size, options.batches)
        print(row, flush=True)
        rows.append(row)
    card = f"{options.ranks}x {read_driver().gpus[0].name}"
    protocol.write("whole-model", rows, gpu=card, measured_commit=options.commit)


def measure(llm: LLM, vocab_size: int, batches: list[int]) -> dict[str, Any]:
    """Tokens a second of prompts and of decoding, and milliseconds to a first token."""

    def seconds(num_prompts: int, prompt_tokens: int, max_tokens: int, seed: int) -> float:
        draw = random.Random(seed)
        prompts = [
            [draw.randrange(vocab_size) for _ in range(prompt_tokens)] for _ in range(num_prompts)
        ]
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        started = time.perf_counter()
        llm.generate(prompts, params)
        return time.perf_counter() - started

    seconds(8, PROMPT_TOKENS, 1, 0)
    prefill = [
        NUM_PROMPTS * PROMPT_TOKENS / seconds(NUM_PROMPTS, PROMPT_TOKENS, 1, s) for s in (1, 2, 3)
    ]
    first = [1e3 * seconds(1, PROMPT_TOKENS, 1, seed) for seed in range(5)]
    row: dict[str, Any] = {
        "prefill_tokens_per_second": protocol.spread(prefill),
        "first_token_ms": protocol.spread(first),
    }
    for batch in batches:
        seconds(batch, 128, 8, 4)
        short, long = (seconds(batch, 128, tokens, 4) for tokens in DECODED)
        decoded = batch * (DECODED[1] - DECODED[0])
        row[f"decode_tokens_per_second_{batch}"] = decoded / (long - short)
    return row


if __name__ == "__main__":
    main()
