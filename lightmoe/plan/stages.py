"""Times of the stages of a step, by roofline: what `layouts.py` adds up.

A stage takes the longer of its FLOPs and its bytes of memory; bytes are of the weights that are
really read, that is, of the experts that the step's tokens are expected to touch. Symbols: W ranks,
T tokens, D model width, F expert width, E experts, K experts per token, H heads times their width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightmoe.balancer.pipeline_tasks import LayerShape, draw_choices, roofline_seconds
from lightmoe.moe import transport_model
from lightmoe.moe.placement import initial_placement
from lightmoe.moe.transport_model import (
    ExchangeShape,
    ExchangeTimes,
    TransportChoice,
    choose_transport,
    ways_on,
)
from lightmoe.plan.memory import Wish

# A layer's dozen kernels, inside a CUDA graph; on a CPU the calls themselves.
_LAYER_SECONDS = {"cuda": 30e-6, "cpu": 200e-6}
# Starting an exchange at both ends and waiting for the last rank, beside the links' latencies.
_EXCHANGE_SECONDS = {"cuda": 20e-6, "cpu": 50e-6}
_NUM_DRAWS = 8
_DRAWN_TOKENS = 1024  # more tokens are scaled up: their shares no longer change


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """Of tokens over the ranks of a layer: experts touched and pairs computed on the busiest."""

    experts: float
    pairs: float


def touched(wish: Wish, num_tokens: float, num_ranks: int) -> Touched:
    """Expected on the busiest of `num_ranks` ranks: the mean of a few draws of uniform choices."""
    if num_tokens <= 0:
        return Touched(experts=0.0, pairs=0.0)
    drawn = min(max(1, round(num_tokens)), _DRAWN_TOKENS)
    shape = layer_shape(wish)
    homes = initial_placement(1, shape.num_experts, num_ranks).homes[0]
    experts, pairs = [], []
    for seed in range(_NUM_DRAWS):
        choices = draw_choices(shape, 1, drawn, 0.0, seed).ravel()
        counts = np.bincount(choices, minlength=shape.num_experts)
        experts.append(np.bincount(homes, weights=counts > 0).max())
        pairs.append(np.bincount(homes, weights=counts).max())
    scale = num_tokens / drawn
    return Touched(experts=float(np.mean(experts)), pairs=float(np.mean(pairs)) * scale)


def layer_shape(wish: Wish) -> LayerShape:
    """The model's MoE layer."""
    return LayerShape.of_model(
        wish.model, wish.model_name, wish.element_bytes, wish.expert_element_bytes
    )


def dense_seconds(wish: Wish, num_tokens: float, num_sampled: float, share: float = 1.0) -> float:
    """All dense weights of all layers once, and the head for the tokens to sample from.

    2 elements T FLOPs, or the weights' bytes; `share` of them are on this rank.
    """
    head = wish.model.vocab_size * wish.model.hidden_size
    tables = head if wish.model.tie_word_embeddings else 2 * head
    body = (wish.model.dense_elements - tables) * share
    device = wish.slowest
    return roofline_seconds(
        device, 2 * num_tokens * body, body * wish.element_bytes
    ) + roofline_seconds(device, 2 * num_sampled * head * share, head * share * wish.element_bytes)


def attention_seconds(wish: Wish, num_tokens: float, num_sequences: float, share: float) -> float:
    """Reading the cache of each sequence, or 4 H T context FLOPs a layer, half of it masked."""
    model = wish.model
    cache = model.cache_elements_per_position * wish.prompt * num_sequences * wish.element_bytes
    width = model.num_attention_heads * model.head_dim * model.num_hidden_layers
    flops = 2 * width * num_tokens * wish.prompt
    return roofline_seconds(wish.slowest, flops * share, cache * share)


def expert_seconds(wish: Wish, busiest: Touched, share: float = 1.0) -> float:
    """One layer's experts on the busiest rank: 6 D F FLOPs a pair, or the touched weights."""
    model = wish.model
    flops = 2 * model.expert_elements * busiest.pairs
    activations = busiest.pairs * (2 * model.hidden_size + 3 * model.moe_intermediate_size)
    num_bytes = busiest.experts * wish.expert_bytes + activations * wish.element_bytes
    return roofline_seconds(wish.slowest, flops * share, num_bytes * share)


def fixed_seconds(wish: Wish) -> float:
    """Starting the kernels of all layers."""
    return wish.model.num_hidden_layers * _LAYER_SECONDS[wish.slowest.kind]


def tokens_on_ranks(wish: Wish, per_sequence: int, most: int) -> list[int]:
    """Tokens of each rank in one step: its sequences' of `per_sequence`, at most so many."""
    each, rest = divmod(wish.batch, wish.num_ranks)
    return [min(most, (each + (rank < rest)) * per_sequence) for rank in range(wish.num_ranks)]


def exchange_matrices(wish: Wish, tokens: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expected bytes [W, W] of a layer's choice, rows and results, given each rank's tokens."""
    return transport_model.exchange_matrices(exchange_shape(wish), tokens)


def exchange_shape(wish: Wish) -> ExchangeShape:
    """Sizes of a layer's exchange."""
    return ExchangeShape(
        num_experts=wish.model.num_experts,
        num_experts_per_token=wish.model.num_experts_per_tok,
        width=wish.model.hidden_size,
        element_bytes=wish.element_bytes,
    )


def launch_transport(wish: Wish) -> TransportChoice | None:
    """What `launch --transport auto` takes for steps of these sizes; None for one rank."""
    ways = ways_on(wish.topology)
    if not ways:
        return None
    return choose_transport(
        wish.topology,
        ways,
        exchange_shape(wish),
        prefill_tokens=max(tokens_on_ranks(wish, wish.prompt, wish.step_tokens)),
        decode_tokens=max(tokens_on_ranks(wish, 1, wish.batch)),
    )


def layer_exchange(wish: Wish, tokens: list[float]) -> ExchangeTimes:
    """A layer's exchanges by that transport, given each rank's tokens; one rank alone has none."""
    choice = launch_transport(wish)
    if choice is None:
        return ExchangeTimes(0.0, 0.0, 0.0)
    return transport_model.predict(wish.topology, choice.way, exchange_shape(wish), tokens)


def exchange_seconds(wish: Wish, matrix: np.ndarray) -> float:
    """An exchange of these bytes [W, W] by other software; one rank alone has none."""
    if not matrix.any():
        return 0.0
    start = _EXCHANGE_SECONDS[wish.slowest.kind]
    return start + wish.topology.all_to_all_seconds(matrix.tolist())
