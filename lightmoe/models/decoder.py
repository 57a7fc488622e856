"""The decoder that Mixtral and Qwen3-MoE are: attention and experts, pre-norm, N times over.

The two differ in names, in query and key norms, and in how the router's weights are scaled; all of
that is in ModelConfig.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from lightmoe.layers.attention import Attention, AttentionStep
from lightmoe.layers.basic import Linear, RMSNorm, Rotary
from lightmoe.models.config import ModelConfig
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
        self.load = LoadCounter(config.num_hidden_layers, config.num_experts, device)
        self.rotary = Rotary(config.head_dim, config.rope_theta, max_model_len, device)
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
    """hidden += attention(norm(hidden)); hidden += experts(norm(hidden))."""

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
        self._experts_norm = RMSNorm(
            read(prefix + "post_attention_layernorm.weight"), config.rms_norm_eps
        )
        gate = Gate(
            read(f"{prefix}{config.mlp_prefix}.gate.weight"),
            config.num_experts_per_tok,
            renormalize=config.norm_topk_prob,
        )
        self._moe = MoELayer(layer, gate, load, make_dispatcher(group, layer), Experts(pool))

    def __call__(self, hidden: Tensor, step: AttentionStep) -> Tensor:
        """[T, D] -> [T, D]. Without tokens here there is no attention, but the experts serve."""
        if len(hidden):
            hidden = hidden + self._attention(self._input_norm(hidden), step)
        return hidden + self._moe(self._experts_norm(hidden))


def _attention(layer: int, config: ModelConfig, read: WeightReader) -> Attention:
    prefix = f"model.layers.{layer}.self_attn."
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
    for layer, expert, slot in group.placement.hosted(group.rank):
        gate, up, down = (read(config.expert_tensor(layer, expert, part)) for part in range(3))
        layout.write(pool.blobs[slot], gate, up, down)
    return pool
