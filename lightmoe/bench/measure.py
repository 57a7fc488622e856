"""One row: a batch of prompts of one length, run again and again, in figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lightmoe.bench.straggler import find_straggler, load_between, max_over_mean
from lightmoe.bench.sweep import Prompts, Sweep
from lightmoe.bench.targets import Stream, Target

PERCENTILES = (50, 95, 99)

Row = dict[str, Any]


def measure(
    target: Target, prompts: Prompts, batch_size: int, prompt_length: int, sweep: Sweep
) -> Row:
    """Warm up, measure `num_repeats` times, and put it in figures.

    Each repeat is two runs: answers of one token, for the prefill, and answers long enough for
    `output_length` tokens while every sequence decodes. Prompts differ from run to run.
    """
    room = target.facts.max_model_len - prompt_length

    def run(num_tokens: int) -> list[Stream]:
        return target.run(prompts.take(batch_size, prompt_length), num_tokens)

    num_tokens = sweep.output_length
    for _ in range(sweep.num_warmups):
        num_tokens = min(sweep.output_length + _lead(run(num_tokens)), room)
    before, preempted = target.load(), target.num_preemptions()
    prefills, answers = [], []
    for _ in range(sweep.num_repeats):
        prefills.append(run(1))
        answers.append(run(num_tokens))
    after = target.num_preemptions()
    return {
        "routing": target.facts.routing,
        "batch_size": batch_size,
        "prompt_length": prompt_length,
        "output_length": num_tokens,
        **timings(prefills, answers, prompt_length),
        **_balance(load_between(before, target.load())),
        "num_preemptions": None if after is None or preempted is None else after - preempted,
    }


def timings(
    prefills: Sequence[Sequence[Stream]], answers: Sequence[Sequence[Stream]], prompt_length: int
) -> Row:
    """Rates as medians with their spread over the runs; delays in ms over all answers of all runs.

    Decode tokens/s are None where the batch never decoded all at once.
    """
    decodes = [decode_rate(run) for run in answers]
    gaps = [gap for run in answers for stream in run for gap in np.diff(stream.tokens)]
    return {
        "prefill_tokens_per_second": spread([prefill_rate(run, prompt_length) for run in prefills]),
        "decode_tokens_per_second": None
        if None in decodes
        else spread([rate for rate in decodes if rate is not None]),
        "output_tokens_per_second": spread([output_rate(run) for run in answers]),
        "ttft_ms": percentiles([s.tokens[0] - s.asked for run in answers for s in run]),
        "inter_token_ms": percentiles(gaps),
    }


def prefill_rate(run: Sequence[Stream], prompt_length: int) -> float:
    """Prompt tokens per second of a run, until the last first token."""
    begin = min(stream.asked for stream in run)
    return len(run) * prompt_length / (max(stream.tokens[0] for stream in run) - begin)


def output_rate(run: Sequence[Stream]) -> float:
    """Tokens per second over the whole run, prefill and all."""
    begin, end = min(stream.asked for stream in run), max(stream.tokens[-1] for stream in run)
    return sum(len(stream.tokens) for stream in run) / (end - begin)


def decode_rate(run: Sequence[Stream]) -> float | None:
    """Tokens per second while all sequences decode: the sum of their rates from the last first
    token to the first last one. None where there is no such time.
    """
    begin = max(stream.tokens[0] for stream in run)
    end = min(stream.tokens[-1] for stream in run)
    total = 0.0
    for stream in run:
        inside = [time for time in stream.tokens if begin <= time <= end]
        if len(inside) < 2 or inside[0] == inside[-1]:
            return None
        total += (len(inside) - 1) / (inside[-1] - inside[0])
    return total


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "num_samples": len(samples),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles in ms, between two samples in proportion."""
    values = np.percentile(seconds, PERCENTILES) * 1e3
    named = {f"p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}
    return {**named, "num_samples": len(seconds)}


def _lead(run: Sequence[Stream]) -> int:
    """Tokens that the first sequence has when the last one begins."""
    begin = max(stream.tokens[0] for stream in run)
    return max(sum(time < begin for time in stream.tokens) for stream in run)


def _balance(load: Any) -> Row:
    straggler = find_straggler(load)
    steps = max(load.num_steps, 1)
    return {
        "straggler": None if straggler is None else asdict(straggler),
        "rank_load_max_over_mean": max_over_mean(load),
        "rank_step_ms": [seconds / steps * 1e3 for seconds in load.rank_seconds],
    }
