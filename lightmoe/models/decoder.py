"""The decoder that Mixtral, Qwen3-MoE and DeepSeek-V2 are: attention and experts, pre-norm.

They differ in names, in their attention, in how the router chooses and scales, in shared experts
and in first layers without experts; all of that is in ModelConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import embedding

from lightmoe.layers.attention import Attention, AttentionStep
from lightmoe.layers.basic import HeadLinear, Linear, RMSNorm, Rotary
from lightmoe.layers.latent_attention import LatentAttention
from lightmoe.models.model_config import MLAConfig, ModelConfig
from lightmoe.models.weights import WeightReader
from lightmoe.moe.dispatch import (
    CopyEngineDispatcher,
    Dispatcher,
    ExpertGroup,
    make_dispatcher,
)
from lightmoe.moe.experts import Experts, SlotPool
from lightmoe.moe.gate import Gate
from lightmoe.moe.halves import InFlight
from lightmoe.moe.layer import MoELayer
from lightmoe.moe.load import LoadCounter
from lightmoe.moe.overflow import Overflow
from lightmoe.moe.overlap_model import Overlap
from lightmoe.moe.skew import RoutingSkew
from lightmoe.quant.packing import ExpertLayout
from lightmoe.telemetry.trace import span


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a decoder is made of. With `deterministic` a row's products depend on that row only."""

    config: ModelConfig
    read: WeightReader
    group: ExpertGroup
    pool: SlotPool
    deterministic: bool = True
    skew: RoutingSkew | None = None
    overflow: Overflow | None = None
    overlap: Overlap = field(default_factory=Overlap)

    def linear(self, *names: str, swiglu: bool = False) -> Linear:
        """One product with these weights, one's columns after the other's."""
        weights = [self.read(name) for name in names]
        return Linear(
            weights[0] if len(weights) == 1 else torch.cat(weights),
            swiglu=swiglu,
            deterministic=self.deterministic,
        )

    def norm(self, name: str) -> RMSNorm:
        """A norm with this weight."""
        return RMSNorm(self.read(name), self.config.rms_norm_eps)


class Decoder:
    """A causal language model whose experts are spread over the ranks of a group."""

    def __init__(self, parts: Parts, max_model_len: int) -> None:
        config = parts.config
        self._embedding = parts.read("model.embed_tokens.weight")
        device = self._embedding.device
        self.num_experts_per_token = config.num_experts_per_tok
        self.dense_elements_per_layer = config.dense_elements_per_layer
        self.load = LoadCounter(len(config.moe_layers), config.num_experts, device)
        self.rotary = Rotary(
            config.rotary_dim, config.rope_theta, max_model_len, device, config.yarn
        )
        # Of all layers: what a step's products have found out of their sizes serves the next layer.
        experts = Experts(parts.pool, deterministic=parts.deterministic)
        self._layers = [
            DecoderLayer(layer, parts, self.load, experts)
            for layer in range(config.num_hidden_layers)
        ]
        self.overlap = parts.overlap
        self.overflow = parts.overflow
        self.moe_layers = [layer.moe for layer in self._layers if layer.moe is not None]
        if parts.group.residency is not None:
            for moe, following in pairwise(self.moe_layers):
                moe.next_gate = following.gate
        self._norm = parts.norm("model.norm.weight")
        head = self._embedding if config.tie_word_embeddings else parts.read("lm_head.weight")
        self._head = Linear(head, deterministic=parts.deterministic, output_float32=True)

    def forward(self, token_ids: Tensor, step: AttentionStep) -> Tensor:
        """Token ids [T] -> hidden states after the last norm [T, D]."""
        hidden, added = embedding(token_ids, self._embedding), None
        for layer in self._layers:
            hidden, added = layer(hidden, added, step)
        return self._norm.of_sum(hidden, added)[1]

    def forward_halves(
        self, halves: Sequence[tuple[Tensor, AttentionStep]], begin_half: Callable[[int], None]
    ) -> list[Tensor]:
        """`forward` of two halves of a step, the exchange of each behind the other's computing.

        `begin_half(0)` or `(1)` is called before what the ranks exchange for that half.
        """
        rows = [embedding(token_ids, self._embedding) for token_ids, _ in halves]
        waiting: list[Callable[[], Tensor]] = []  # what the layer before adds to each half
        for layer in self._layers:
            flights = []
            for half, (_, step) in enumerate(halves):
                # What comes back last has longest to do so.
                added = waiting[half]() if waiting else None
                rows[half], normed = layer.attend(rows[half], added, step)
                begin_half(half)
                flights.append((normed, layer.begin(normed, half)))
            for _, flight in flights:
                layer.compute(flight)
            waiting = [partial(layer.finish, *flight) for flight in flights]
        return [
            self._norm.of_sum(hidden, finish())[1]
            for hidden, finish in zip(rows, waiting, strict=True)
        ]

    def set_overlap(self, overlap: Overlap) -> None:
        """How the layers with experts overlap from now on."""
        self.overlap = overlap
        for layer in self.moe_layers:
            layer.overlap = overlap

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> fp32 [N, vocabulary]."""
        return self._head(hidden)


class DecoderLayer:
    """hidden += attention(norm(hidden)); hidden += experts(norm(hidden)), or an MLP for them.

    An addition runs with the norm behind it, in one launch: what the experts add is handed on
    beside the hidden states.
    """

    def __init__(self, layer: int, parts: Parts, load: LoadCounter, experts: Experts) -> None:
        config, prefix = parts.config, f"model.layers.{layer}."
        self._layer = layer
        self._input_norm = parts.norm(prefix + "input_layernorm.weight")
        self._attention = _attention(layer, parts)
        self._mlp_norm = parts.norm(prefix + "post_attention_layernorm.weight")
        mlp_prefix = f"{prefix}{config.mlp_prefix}."
        self.moe: MoELayer | None = None
        self._mlp: Callable[[Tensor], Tensor]
        if layer in config.moe_layers:
            number = config.moe_layers.index(layer)
            self._mlp = self.moe = _moe(number, mlp_prefix, parts, load, experts)
        else:
            self._mlp = _swiglu(mlp_prefix, parts)

    def __call__(
        self, hidden: Tensor, added: Tensor | None, step: AttentionStep
    ) -> tuple[Tensor, Tensor]:
        """[T, D] and what is to be added first -> the same, [T, D] each."""
        hidden, normed = self.attend(hidden, added, step)
        return hidden, self._mlp(normed)

    def attend(
        self, hidden: Tensor, added: Tensor | None, step: AttentionStep
    ) -> tuple[Tensor, Tensor]:
        """Attention's part: hidden states with it, and normed for the experts.

        Without tokens here there is none, but the experts serve.
        """
        if not len(hidden):
            return hidden, hidden
        with span("attention", self._layer):
            hidden, normed = self._input_norm.of_sum(hidden, added)
            return self._mlp_norm.of_sum(hidden, self._attention(normed, step))

    def begin(self, normed: Tensor, half: int) -> InFlight | None:
        """Send a half of a step to the experts; None where the layer has an MLP for them."""
        return None if self.moe is None else self.moe.begin(normed, half)

    def compute(self, flight: InFlight | None) -> None:
        """The experts' products of a half."""
        if self.moe is not None and flight is not None:
            self.moe.compute(flight)

    def finish(self, normed: Tensor, flight: InFlight | None) -> Tensor:
        """What the experts, or the MLP, add to a half."""
        if self.moe is None or flight is None:
            return self._mlp(normed)
        return self.moe.finish(flight)


def _moe(layer: int, prefix: str, parts: Parts, load: LoadCounter, experts: Experts) -> MoELayer:
    """`layer` counts the layers that have experts."""
    config, router_weight = parts.config, parts.read(prefix + "gate.weight")
    gate = Gate(
        router_weight.float() if config.float32_router else router_weight,
        config.num_experts_per_tok,
        renormalize=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        num_groups=config.num_expert_groups,
        num_groups_per_token=config.num_groups_per_token,
        deterministic=parts.deterministic,
    )
    if parts.skew is not None:
        gate = parts.skew.instead_of(gate, layer)
    dispatcher = make_dispatcher(parts.group, layer, router_weight.device, experts.tokens_per_tile)
    shared = _swiglu(prefix + "shared_experts.", parts) if config.num_shared_experts else None
    second: Dispatcher | None = None
    if parts.group.second_peers is not None:
        second = CopyEngineDispatcher(
            parts.group, layer, parts.group.second_peers, experts.tokens_per_tile
        )
    return MoELayer(
        layer,
        gate,
        load,
        dispatcher,
        experts,
        shared,
        parts.overlap,
        second_dispatcher=second,
        overflow=parts.overflow,
    )


def _swiglu(prefix: str, parts: Parts) -> Callable[[Tensor], Tensor]:
    """down(silu(gate) * up): dense layers and shared experts."""
    inner = parts.linear(f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight", swiglu=True)
    down = parts.linear(f"{prefix}down_proj.weight")

    def mlp(hidden: Tensor) -> Tensor:
        with span("mlp"):
            return down(inner(hidden))

    return mlp


def _attention(layer: int, parts: Parts) -> Attention | LatentAttention:
    config, prefix = parts.config, f"model.layers.{layer}.self_attn."
    if config.mla is not None:
        return _latent_attention(layer, prefix, parts, config.mla)
    norms = None
    if config.qk_norm:
        norms = parts.norm(prefix + "q_norm.weight"), parts.norm(prefix + "k_norm.weight")
    return Attention(
        layer,
        parts.linear(*(f"{prefix}{part}_proj.weight" for part in "qkv")),
        parts.linear(prefix + "o_proj.weight"),
        norms,
    )


_LATENT_EPSILON = 1e-6
"""Of the norms inside latent attention: DeepSeek-V2 does not take rms_norm_eps for these."""


def _latent_attention(layer: int, prefix: str, parts: Parts, mla: MLAConfig) -> LatentAttention:
    config = parts.config
    expand = parts.read(prefix + "kv_b_proj.weight").unflatten(0, (config.num_attention_heads, -1))
    keys, values = expand.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=1)
    score_scale: float = mla.query_dim**-0.5
    if config.yarn is not None:
        score_scale *= config.yarn.score_scale
    return LatentAttention(
        layer,
        _latent_query(prefix, mla, parts),
        parts.linear(prefix + "kv_a_proj_with_mqa.weight"),
        RMSNorm(parts.read(prefix + "kv_a_layernorm.weight"), _LATENT_EPSILON),
        HeadLinear(keys.transpose(1, 2)),
        HeadLinear(values),
        parts.linear(prefix + "o_proj.weight"),
        score_scale,
    )


def _latent_query(prefix: str, mla: MLAConfig, parts: Parts) -> Callable[[Tensor], Tensor]:
    if mla.q_lora_rank is None:
        return parts.linear(prefix + "q_proj.weight")
    compress = parts.linear(prefix + "q_a_proj.weight")
    norm = RMSNorm(parts.read(prefix + "q_a_layernorm.weight"), _LATENT_EPSILON)
    expand = parts.linear(prefix + "q_b_proj.weight")
    return lambda hidden: expand(norm(compress(hidden)))


def load_experts(
    config: ModelConfig,
    read: WeightReader,
    group: ExpertGroup,
    dtype: torch.dtype,
    device: torch.device,
    num_free_slots: int = 0,
) -> SlotPool:
    """Fill this rank's slots with the experts that the placement puts there."""
    layout = ExpertLayout(config.hidden_size, config.moe_intermediate_size)
    num_slots = group.placement.num_slots(group.rank) + num_free_slots
    pool = SlotPool(num_slots, layout, dtype, device)
    for moe_layer, expert, slot in group.placement.hosted(group.rank):
        read_expert(config, read, moe_layer, expert, pool.blobs[slot])
    return pool


def read_expert(
    config: ModelConfig, read: WeightReader, moe_layer: int, expert: int, blob: Tensor
) -> None:
    """Fill one blob [elements] with an expert; moe_layer counts the layers that have experts."""
    layer = config.moe_layers[moe_layer]
    gate, up, down = (read(config.expert_tensor(layer, expert, part)) for part in range(3))
    ExpertLayout(config.hidden_size, config.moe_intermediate_size).write(blob, gate, up, down)
