"""The decoder that Mixtral, Qwen3-MoE and DeepSeek-V2 are: attention and experts, pre-norm.

They differ in names, in their attention, in how the router chooses and scales, in shared experts
and in first layers without experts; all of that is in ModelConfig.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding

from lightmoe.layers.attention import Attention, AttentionStep
from lightmoe.layers.basic import HeadLinear, Linear, RMSNorm, Rotary, SwiGLU
from lightmoe.layers.latent_attention import LatentAttention
from lightmoe.models.model_config import MLAConfig, ModelConfig
from lightmoe.models.weights import WeightReader
from lightmoe.moe.dispatch import ExpertGroup, make_dispatcher
from lightmoe.moe.experts import Experts, SlotPool
from lightmoe.moe.gate import Gate
from lightmoe.moe.layer import MoELayer
from lightmoe.moe.load import LoadCounter
from lightmoe.quant.packing import ExpertLayout


class Decoder:
    """A causal language model whose experts are spread over `group`."""

    def __init__(
        self,
        config: ModelConfig,
        read: WeightReader,
        group: ExpertGroup,
        pool: SlotPool,
        max_model_len: int,
    ) -> None:
        self._embedding = read("model.embed_tokens.weight")
        device = self._embedding.device
        self.load = LoadCounter(len(config.moe_layers), config.num_experts, device)
        self.rotary = Rotary(
            config.rotary_dim, config.rope_theta, max_model_len, device, config.yarn
        )
        self._layers = [
            DecoderLayer(layer, config, read, group, pool, self.load)
            for layer in range(config.num_hidden_layers)
        ]
        self._norm = RMSNorm(read("model.norm.weight"), config.rms_norm_eps)
        self._head = Linear(
            self._embedding if config.tie_word_embeddings else read("lm_head.weight")
        )

    def forward(self, token_ids: Tensor, step: AttentionStep) -> Tensor:
        """Token ids [T] -> hidden states after the last norm [T, D]."""
        hidden = embedding(token_ids, self._embedding)
        for layer in self._layers:
            hidden = layer(hidden, step)
        return self._norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> fp32 [N, vocabulary]."""
        return self._head(hidden).float()


class DecoderLayer:
    """hidden += attention(norm(hidden)); hidden += experts(norm(hidden)), or an MLP for them."""

    def __init__(
        self,
        layer: int,
        config: ModelConfig,
        read: WeightReader,
        group: ExpertGroup,
        pool: SlotPool,
        load: LoadCounter,
    ) -> None:
        prefix = f"model.layers.{layer}."
        self._input_norm = RMSNorm(read(prefix + "input_layernorm.weight"), config.rms_norm_eps)
        self._attention = _attention(layer, config, read)
        self._mlp_norm = RMSNorm(
            read(prefix + "post_attention_layernorm.weight"), config.rms_norm_eps
        )
        mlp_prefix = f"{prefix}{config.mlp_prefix}."
        self._mlp: Callable[[Tensor], Tensor]
        if layer in config.moe_layers:
            moe_layer = config.moe_layers.index(layer)
            self._mlp = _moe(moe_layer, mlp_prefix, config, read, group, pool, load)
        else:
            self._mlp = _swiglu(mlp_prefix, read)

    def __call__(self, hidden: Tensor, step: AttentionStep) -> Tensor:
        """[T, D] -> [T, D]. Without tokens here there is no attention, but the experts serve."""
        if len(hidden):
            hidden = hidden + self._attention(self._input_norm(hidden), step)
        return hidden + self._mlp(self._mlp_norm(hidden))


def _moe(
    layer: int,
    prefix: str,
    config: ModelConfig,
    read: WeightReader,
    group: ExpertGroup,
    pool: SlotPool,
    load: LoadCounter,
) -> MoELayer:
    """`layer` counts the layers that have experts."""
    router_weight = read(prefix + "gate.weight")
    gate = Gate(
        router_weight.float() if config.float32_router else router_weight,
        config.num_experts_per_tok,
        renormalize=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
        num_groups=config.num_expert_groups,
        num_groups_per_token=config.num_groups_per_token,
    )
    shared = _swiglu(prefix + "shared_experts.", read) if config.num_shared_experts else None
    return MoELayer(layer, gate, load, make_dispatcher(group, layer), Experts(pool), shared)


def _swiglu(prefix: str, read: WeightReader) -> SwiGLU:
    gate, up, down = (read(f"{prefix}{part}_proj.weight") for part in ("gate", "up", "down"))
    return SwiGLU(gate, up, down)


def _attention(layer: int, config: ModelConfig, read: WeightReader) -> Attention | LatentAttention:
    prefix = f"model.layers.{layer}.self_attn."
    if config.mla is not None:
        return _latent_attention(layer, prefix, config, config.mla, read)
    norms: tuple[RMSNorm, RMSNorm] | tuple[None, None] = (None, None)
    if config.qk_norm:
        norms = (
            RMSNorm(read(prefix + "q_norm.weight"), config.rms_norm_eps),
            RMSNorm(read(prefix + "k_norm.weight"), config.rms_norm_eps),
        )
    return Attention(
        layer,
        Linear(read(prefix + "q_proj.weight")),
        Linear(read(prefix + "k_proj.weight")),
        Linear(read(prefix + "v_proj.weight")),
        Linear(read(prefix + "o_proj.weight")),
        config.head_dim,
        *norms,
    )


_LATENT_EPSILON = 1e-6
"""Of the norms inside latent attention: DeepSeek-V2 does not take rms_norm_eps for these."""


def _latent_attention(
    layer: int, prefix: str, config: ModelConfig, mla: MLAConfig, read: WeightReader
) -> LatentAttention:
    expand = read(prefix + "kv_b_proj.weight").unflatten(0, (config.num_attention_heads, -1))
    keys, values = expand.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=1)
    score_scale: float = mla.query_dim**-0.5
    if config.yarn is not None:
        score_scale *= config.yarn.score_scale
    return LatentAttention(
        layer,
        _latent_query(prefix, mla, read),
        Linear(read(prefix + "kv_a_proj_with_mqa.weight")),
        RMSNorm(read(prefix + "kv_a_layernorm.weight"), _LATENT_EPSILON),
        HeadLinear(keys.transpose(1, 2)),
        HeadLinear(values),
        Linear(read(prefix + "o_proj.weight")),
        score_scale,
    )


def _latent_query(prefix: str, mla: MLAConfig, read: WeightReader) -> Callable[[Tensor], Tensor]:
    if mla.q_lora_rank is None:
        return Linear(read(prefix + "q_proj.weight"))
    compress = Linear(read(prefix + "q_a_proj.weight"))
    norm = RMSNorm(read(prefix + "q_a_layernorm.weight"), _LATENT_EPSILON)
    expand = Linear(read(prefix + "q_b_proj.weight"))
    return lambda hidden: expand(norm(compress(hidden)))


def load_experts(
    config: ModelConfig,
    read: WeightReader,
    group: ExpertGroup,
    dtype: torch.dtype,
    device: torch.device,
) -> SlotPool:
    """Fill this rank's slots with the experts that the placement puts there."""
    layout = ExpertLayout(config.hidden_size, config.moe_intermediate_size)
    pool = SlotPool(group.placement.num_slots(group.rank), layout, dtype, device)
    for moe_layer, expert, slot in group.placement.hosted(group.rank):
        layer = config.moe_layers[moe_layer]
        gate, up, down = (read(config.expert_tensor(layer, expert, part)) for part in range(3))
        layout.write(pool.blobs[slot], gate, up, down)
    return pool
