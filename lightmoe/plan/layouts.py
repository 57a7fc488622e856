"""How fast a model is under expert parallelism and under the alternatives.

Compute is the sum of the stages of `stages.py`, exchanges take what the topology says, all at once.
Symbols: B sequences, W ranks, L layers, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lightmoe.moe.overlap_model import LayerCosts, choose_chunks, fit
from lightmoe.moe.transport_model import ExchangeTimes
from lightmoe.plan.memory import Wish, usable_bytes
from lightmoe.plan.stages import (
    attention_seconds,
    dense_seconds,
    exchange_matrices,
    exchange_seconds,
    expert_seconds,
    fixed_seconds,
    launch_transport,
    layer_exchange,
    tokens_on_ranks,
    touched,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to put a model on the ranks: bytes of the fullest, and what is predicted.

    Rates are tokens per second of all ranks together; link bytes are of one decode step, all ranks.
    `problem` says why it cannot be; the figures then say what it would reach.
    """

    name: str
    rank_bytes: int
    problem: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_step_seconds: float
    link_bytes_per_step: float
    note: str = ""


def all_layouts(wish: Wish) -> list[Layout]:
    """Expert parallelism first, then what else could be done with these ranks."""
    layouts = [expert_parallel(wish), one_card(wish)]
    if wish.num_ranks > 1:
        layouts += [replicate(wish), tensor_parallel(wish), layer_split(wish)]
    return layouts


def expert_parallel(wish: Wish) -> Layout:
    """Attention of own sequences on every rank, experts spread over all: what Light-MoE does.

    Decode exchanges in the open; prefill overlaps by chunks where the cost model says that it pays.
    """
    layers = len(wish.model.moe_layers)
    decode_tokens = tokens_on_ranks(wish, 1, wish.batch)
    matrices = exchange_matrices(wish, [float(n) for n in decode_tokens])
    exchange = layer_exchange(wish, [float(n) for n in decode_tokens]).total
    busiest = max(decode_tokens)
    decode = (
        dense_seconds(wish, busiest, busiest)
        + attention_seconds(wish, busiest, busiest, 1.0)
        + layers * (expert_seconds(wish, touched(wish, wish.batch, wish.num_ranks)) + exchange)
        + fixed_seconds(wish)
    )
    prefill, note = _expert_parallel_prefill(wish)
    needed = -(-wish.num_expert_copies // (wish.num_ranks - wish.spares)) * wish.expert_bytes
    return _layout(
        wish,
        "expert parallel",
        needed + wish.dense_bytes + wish.buffer_bytes + wish.cache_bytes(wish.sequences_per_rank),
        prefill=prefill,
        decode_seconds=decode,
        link_bytes=layers * float(sum(matrix.sum() for matrix in matrices)),
        note=note,
    )


def _expert_parallel_prefill(wish: Wish) -> tuple[float, str]:
    """Tokens per second of prompts, and how many chunks that takes."""
    tokens = tokens_on_ranks(wish, wish.prompt, wish.step_tokens)
    total, busiest = sum(tokens), max(tokens)

    def exchange(fullest: int) -> ExchangeTimes:
        return layer_exchange(wish, [count * fullest / busiest for count in tokens])

    def experts(fullest: int) -> float:
        spread = touched(wish, total * fullest / busiest, wish.num_ranks)
        return expert_seconds(wish, spread)

    sizes = (max(1, busiest // 8), busiest)
    stages: list[Callable[[int], float]] = [
        lambda size: exchange(size).dispatch,
        lambda size: 2 / 3 * experts(size),
        lambda size: 1 / 3 * experts(size),
        lambda size: exchange(size).combine,
    ]
    transport = launch_transport(wish)
    if transport is None or transport.way.transport != "copy_engine":
        layer, note = sum(stage(busiest) for stage in stages), "no overlap: the host takes part"
    elif sizes[0] == sizes[1]:
        layer = sum(stage(busiest) for stage in stages)
        note = "1 chunk: a single token"
    else:
        dispatch, up, down, combine = (fit([(n, stage(n)) for n in sizes]) for stage in stages)
        costs = LayerCosts(dispatch, up, down, combine)
        choice = choose_chunks(costs, busiest)
        layer, note = choice.predicted_seconds, f"prefill in {choice.reason}"
    per_step = (
        dense_seconds(wish, busiest, busiest / wish.prompt)
        + attention_seconds(wish, busiest, busiest / wish.prompt, 1.0)
        + len(wish.model.moe_layers) * (layer + exchange(busiest).choice)
        + fixed_seconds(wish)
    )
    return total / per_step, note


def _alone_seconds(
    wish: Wish, num_tokens: float, num_sequences: float, share: float = 1.0
) -> float:
    """A step of so many tokens where every expert is on the spot, `share` of each matrix."""
    here = touched(wish, num_tokens, 1)
    return (
        dense_seconds(wish, num_tokens, num_sequences, share)
        + attention_seconds(wish, num_tokens, num_sequences, share)
        + len(wish.model.moe_layers) * expert_seconds(wish, here, share)
    )


def _model_bytes(wish: Wish) -> int:
    return wish.dense_bytes + wish.num_expert_copies * wish.expert_bytes


def one_card(wish: Wish) -> Layout:
    """The whole model on the first device, all sequences there; nothing is exchanged."""
    return _whole_model(replace(wish, topology=wish.topology.first(1), spares=0), "one card")


def _whole_model(wish: Wish, name: str) -> Layout:
    tokens = min(wish.batch * wish.prompt, max(wish.step_tokens, wish.prompt))
    decode = _alone_seconds(wish, wish.batch, wish.batch) + fixed_seconds(wish)
    prefill = _alone_seconds(wish, tokens, tokens / wish.prompt) + fixed_seconds(wish)
    return _layout(
        wish,
        name,
        _model_bytes(wish) + wish.buffer_bytes + wish.cache_bytes(wish.batch),
        prefill=tokens / prefill,
        decode_seconds=decode,
        link_bytes=0.0,
    )


def replicate(wish: Wish) -> Layout:
    """The whole model on every rank, each with its share of the sequences."""
    busy = min(wish.batch, wish.num_ranks)
    each = _whole_model(replace(wish, batch=wish.sequences_per_rank), "replicate")
    return replace(
        each,
        prefill_tokens_per_second=each.prefill_tokens_per_second * busy,
        decode_tokens_per_second=wish.batch / each.decode_step_seconds,
    )


def tensor_parallel(wish: Wish) -> Layout:
    """Every matrix cut over all ranks, every rank runs all tokens; two all-reduces a layer.

    An all-reduce of n bytes is the faster of a ring, 2 (W - 1) steps of n / W, and of sending n
    to everybody.
    """
    num_ranks, model = wish.num_ranks, wish.model
    share = 1 / num_ranks
    tokens = min(wish.batch * wish.prompt, max(wish.step_tokens, wish.prompt))

    def step(num_tokens: int, num_sequences: float) -> float:
        num_bytes = num_tokens * model.hidden_size * wish.element_bytes
        reduce = 2 * model.num_hidden_layers * _all_reduce_seconds(wish, num_bytes)
        return _alone_seconds(wish, num_tokens, num_sequences, share) + reduce + fixed_seconds(wish)

    decode = step(wish.batch, wish.batch)
    reduced = wish.batch * model.hidden_size * wish.element_bytes * 2 * (num_ranks - 1)
    layout = _layout(
        wish,
        "tensor parallel",
        _model_bytes(wish) // num_ranks
        + wish.buffer_bytes
        + wish.cache_bytes(wish.batch) // num_ranks,
        prefill=tokens / step(tokens, tokens / wish.prompt),
        decode_seconds=decode,
        link_bytes=2.0 * model.num_hidden_layers * reduced,
        note="other software",
    )
    if model.num_attention_heads % num_ranks:
        problem = f"{model.num_attention_heads} heads cannot be cut over {num_ranks} ranks"
        return replace(layout, problem=problem)
    return layout


def _all_reduce_seconds(wish: Wish, num_bytes: float) -> float:
    num_ranks, topology = wish.num_ranks, wish.topology
    ring = np.zeros((num_ranks, num_ranks))
    for rank in range(num_ranks):
        ring[rank, topology.exchange_order(rank)[0]] = num_bytes / num_ranks
    to_all = np.full((num_ranks, num_ranks), float(num_bytes))
    np.fill_diagonal(to_all, 0)
    return min(
        2 * (num_ranks - 1) * exchange_seconds(wish, ring),
        exchange_seconds(wish, to_all),
    )


def layer_split(wish: Wish) -> Layout:
    """Consecutive layers on each rank, the sequences in up to W groups one behind the other."""
    num_ranks, model = wish.num_ranks, wish.model
    groups = min(wish.batch, num_ranks)
    in_group = wish.batch / groups
    share = 1 / num_ranks

    def stage(num_tokens: float, num_sequences: float) -> float:
        layers = _alone_seconds(wish, num_tokens, num_sequences) * share
        hop = num_tokens * model.hidden_size * wish.element_bytes / wish.topology.bandwidth(0, 1)
        latency = wish.topology.latency_seconds(0, 1)
        return layers + hop + latency + fixed_seconds(wish) * share

    prompt_tokens = min(wish.prompt, wish.step_tokens)
    prefill_groups = min(num_ranks, wish.batch * wish.prompt / prompt_tokens)
    prefill = (
        prefill_groups
        * prompt_tokens
        / (num_ranks * stage(prompt_tokens, prompt_tokens / wish.prompt))
    )
    return _layout(
        wish,
        "layer split",
        _model_bytes(wish) // num_ranks
        + wish.buffer_bytes
        + wish.cache_bytes(wish.batch) // num_ranks,
        prefill=prefill,
        decode_seconds=num_ranks * stage(in_group, in_group),
        link_bytes=float(wish.batch * (num_ranks - 1) * model.hidden_size * wish.element_bytes),
        note="other software",
    )


def _layout(
    wish: Wish,
    name: str,
    rank_bytes: int,
    *,
    prefill: float,
    decode_seconds: float,
    link_bytes: float,
    note: str = "",
) -> Layout:
    usable = usable_bytes(wish)
    lacks = rank_bytes > usable
    problem = f"needs {rank_bytes / 2**30:.1f} GiB a rank of {usable / 2**30:.1f}" if lacks else ""
    return Layout(
        name=name,
        rank_bytes=rank_bytes,
        problem=problem,
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=wish.batch / decode_seconds,
        decode_step_seconds=decode_seconds,
        link_bytes_per_step=link_bytes,
        note=note,
    )
