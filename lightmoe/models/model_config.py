"""A model as numbers, and the tensors that it needs. No torch here: the front works with it before
any rank starts.

Shapes: D model width, F expert width, E experts, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightmoe.layers.yarn import Yarn

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2), under the names of Hugging Face's config.json.

    Keys and values of all heads come from one latent of `kv_lora_rank`; beside it each position
    has one key of `qk_rope_head_dim` with rotary positions that all heads share.
    `q_lora_rank` None makes the queries straight from the hidden state.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def query_dim(self) -> int:
        """Width of one head's query, the part without positions first."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def tensors(self, prefix: str, hidden_size: int, num_heads: int) -> Shapes:
        """Name and shape of one layer's tensors in place of q_proj, k_proj and v_proj."""
        queries = num_heads * self.query_dim
        if self.q_lora_rank is None:
            yield prefix + "q_proj.weight", (queries, hidden_size)
        else:
            yield prefix + "q_a_proj.weight", (self.q_lora_rank, hidden_size)
            yield prefix + "q_a_layernorm.weight", (self.q_lora_rank,)
            yield prefix + "q_b_proj.weight", (queries, self.q_lora_rank)
        entry = self.kv_lora_rank + self.qk_rope_head_dim
        yield prefix + "kv_a_proj_with_mqa.weight", (entry, hidden_size)
        yield prefix + "kv_a_layernorm.weight", (self.kv_lora_rank,)
        expanded = num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        yield prefix + "kv_b_proj.weight", (expanded, self.kv_lora_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the models here need to know, under the names of Hugging Face's config.json.

    Counts are num_x where DeepSeek's files say n_x.

    | field | meaning |
    |---|---|
    | mlp_prefix, expert_names (gate, up, down) | how the checkpoint spells its experts |
    | head_dim | width of one head's query |
    | first_k_dense_replace, intermediate_size | so many first layers have an MLP of that width |
    | num_shared_experts | widths of an expert in the MLP that every token passes beside experts |
    | num_expert_groups, num_groups_per_token | a token's experts lie in so many best groups |
    | float32_router | the router's logits are computed in float32 whatever the dtype |
    | mla | latent attention in place of grouped-query attention |
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    norm_topk_prob: bool
    qk_norm: bool
    mlp_prefix: str
    expert_names: tuple[str, str, str]
    eos_token_ids: tuple[int, ...]
    first_k_dense_replace: int = 0
    intermediate_size: int = 0
    num_shared_experts: int = 0
    routed_scaling_factor: float = 1.0
    num_expert_groups: int = 1
    num_groups_per_token: int = 1
    float32_router: bool = False
    mla: MLAConfig | None = None
    yarn: Yarn | None = None

    @property
    def moe_layers(self) -> range:
        """The layers that have experts. Placement and load count these only, from 0."""
        return range(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def rotary_dim(self) -> int:
        """How much of a head turns with its position."""
        return self.head_dim if self.mla is None else self.mla.qk_rope_head_dim

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Heads, key width and value width of what is cached of a position in one layer."""
        if self.mla is None:
            return self.num_key_value_heads, self.head_dim, self.head_dim
        # Values are the latent, which the key begins with.
        return 1, self.mla.kv_lora_rank + self.mla.qk_rope_head_dim, 0

    @property
    def cache_elements_per_position(self) -> int:
        """Elements cached of one position in all layers."""
        heads, key_width, value_width = self.cache_shape
        return self.num_hidden_layers * heads * (key_width + value_width)

    def expert_tensor(self, layer: int, expert: int, part: int) -> str:
        """Name of an expert's gate (part 0), up (1) or down (2) weight."""
        prefix = f"model.layers.{layer}.{self.mlp_prefix}.experts.{expert}"
        return f"{prefix}.{self.expert_names[part]}.weight"

    def dense_tensors(self) -> Shapes:
        """Name and shape of every tensor that each rank holds."""
        width = self.hidden_size
        yield "model.embed_tokens.weight", (self.vocab_size, width)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (width,)
            yield from self._attention_tensors(prefix + "self_attn.")
            yield prefix + "post_attention_layernorm.weight", (width,)
            yield from self._mlp_tensors(layer, f"{prefix}{self.mlp_prefix}.")
        yield "model.norm.weight", (width,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, width)

    def _attention_tensors(self, prefix: str) -> Shapes:
        width, heads = self.hidden_size, self.num_attention_heads
        if self.mla is not None:
            yield from self.mla.tensors(prefix, width, heads)
            yield prefix + "o_proj.weight", (width, heads * self.mla.v_head_dim)
            return
        query, key_value = heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield prefix + "q_proj.weight", (query, width)
        yield prefix + "k_proj.weight", (key_value, width)
        yield prefix + "v_proj.weight", (key_value, width)
        yield prefix + "o_proj.weight", (width, query)
        if self.qk_norm:
            yield prefix + "q_norm.weight", (self.head_dim,)
            yield prefix + "k_norm.weight", (self.head_dim,)

    def _mlp_tensors(self, layer: int, prefix: str) -> Shapes:
        """What each rank holds of it: all of a dense layer's, of the others what is no expert."""
        mlp_width = self.intermediate_size
        if layer in self.moe_layers:
            yield prefix + "gate.weight", (self.num_experts, self.hidden_size)
            mlp_width = self.num_shared_experts * self.moe_intermediate_size
            prefix += "shared_experts."
        if mlp_width:
            yield prefix + "gate_proj.weight", (mlp_width, self.hidden_size)
            yield prefix + "up_proj.weight", (mlp_width, self.hidden_size)
            yield prefix + "down_proj.weight", (self.hidden_size, mlp_width)

    def expert_tensors(self, layer: int, expert: int) -> Shapes:
        """Name and shape of one expert's gate, up and down."""
        wide, tall = (
            (self.moe_intermediate_size, self.hidden_size),
            (self.hidden_size, self.moe_intermediate_size),
        )
        for part, shape in enumerate((wide, wide, tall)):
            yield self.expert_tensor(layer, expert, part), shape

    def all_tensors(self) -> Shapes:
        """Name and shape of every tensor of the checkpoint."""
        yield from self.dense_tensors()
        for layer in self.moe_layers:
            for expert in range(self.num_experts):
                yield from self.expert_tensors(layer, expert)

    @property
    def expert_elements(self) -> int:
        """Elements of one expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def dense_elements_per_layer(self) -> int:
        """Elements of a layer beside its experts, in the mean."""
        num_tables = 1 if self.tie_word_embeddings else 2
        tables = num_tables * self.vocab_size * self.hidden_size
        return (self.dense_elements - tables) // self.num_hidden_layers

    @property
    def dense_elements(self) -> int:
        """Elements of everything that is not an expert."""
        total = 0
        for _, shape in self.dense_tensors():
            elements = 1
            for size in shape:
                elements *= size
            total += elements
        return total
