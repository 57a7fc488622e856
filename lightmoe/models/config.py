"""config.json as numbers, and the tensors that such a model needs. No torch here: the front reads
it before any rank starts.

Shapes: D model width, F expert width, E experts, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightmoe.errors import CheckpointError, UnsupportedModelError

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the models here need to know, under the names of Hugging Face's config.json.

    `mlp_prefix` and `expert_names` (gate, up, down) say how the checkpoint spells its experts.
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

    def expert_tensor(self, layer: int, expert: int, part: int) -> str:
        """Name of an expert's gate (part 0), up (1) or down (2) weight."""
        prefix = f"model.layers.{layer}.{self.mlp_prefix}.experts.{expert}"
        return f"{prefix}.{self.expert_names[part]}.weight"

    def dense_tensors(self) -> Shapes:
        """Name and shape of every tensor that each rank holds."""
        width, query = self.hidden_size, self.num_attention_heads * self.head_dim
        key_value = self.num_key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, width)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (width,)
            yield prefix + "self_attn.q_proj.weight", (query, width)
            yield prefix + "self_attn.k_proj.weight", (key_value, width)
            yield prefix + "self_attn.v_proj.weight", (key_value, width)
            yield prefix + "self_attn.o_proj.weight", (width, query)
            if self.qk_norm:
                yield prefix + "self_attn.q_norm.weight", (self.head_dim,)
                yield prefix + "self_attn.k_norm.weight", (self.head_dim,)
            yield prefix + "post_attention_layernorm.weight", (width,)
            yield prefix + self.mlp_prefix + ".gate.weight", (self.num_experts, width)
        yield "model.norm.weight", (width,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, width)

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
        for layer in range(self.num_hidden_layers):
            for expert in range(self.num_experts):
                yield from self.expert_tensors(layer, expert)

    @property
    def expert_elements(self) -> int:
        """Elements of one expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

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


def read_config(folder: Path) -> ModelConfig:
    """Read config.json; CheckpointError when broken, UnsupportedModelError when foreign."""
    raw = read_json(folder / "config.json")
    architectures = raw.get("architectures") or ["none named"]
    reader = _READERS.get(architectures[0])
    if reader is None:
        raise UnsupportedModelError(
            f"{folder.name} is {architectures[0]}; the architectures served are"
            f" {', '.join(sorted(_READERS))}"
        )
    try:
        return reader(raw, _eos_token_ids(folder, raw))
    except KeyError as error:
        raise CheckpointError(
            f"{folder / 'config.json'} lacks {error}; take a complete config.json"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that names the file."""
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; a model folder needs it") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}; a JSON object is needed")
    return raw


def _eos_token_ids(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json wins: its list is what makes chats end."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    value = generation.get("eos_token_id", raw.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _common(raw: dict[str, Any], eos_token_ids: tuple[int, ...]) -> dict[str, Any]:
    heads = raw["num_attention_heads"]
    rope = raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if raw.get("rope_scaling") or kind != "default":
        raise UnsupportedModelError(
            f"rope scaling {raw.get('rope_scaling') or kind!r} has no code here"
        )
    if raw.get("sliding_window") and raw.get("use_sliding_window", True):
        raise UnsupportedModelError(
            f"sliding_window {raw['sliding_window']} has no code here; only null is served"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(
            f"hidden_act {raw['hidden_act']!r} has no code here; only silu is served"
        )
    return {
        "architecture": raw["architectures"][0],
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "num_hidden_layers": raw["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "num_experts_per_tok": raw["num_experts_per_tok"],
        "max_position_embeddings": raw["max_position_embeddings"],
        "rms_norm_eps": raw["rms_norm_eps"],
        "rope_theta": float(rope.get("rope_theta") or raw["rope_theta"]),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "eos_token_ids": eos_token_ids,
    }


def _read_mixtral(raw: dict[str, Any], eos_token_ids: tuple[int, ...]) -> ModelConfig:
    return ModelConfig(
        **_common(raw, eos_token_ids),
        num_experts=raw["num_local_experts"],
        moe_intermediate_size=raw["intermediate_size"],
        norm_topk_prob=True,
        qk_norm=False,
        mlp_prefix="block_sparse_moe",
        expert_names=("w1", "w3", "w2"),
    )


def _read_qwen3_moe(raw: dict[str, Any], eos_token_ids: tuple[int, ...]) -> ModelConfig:
    if raw.get("decoder_sparse_step", 1) != 1 or raw.get("mlp_only_layers"):
        raise UnsupportedModelError(
            "decoder_sparse_step and mlp_only_layers have no code here; all layers need experts"
        )
    if raw.get("attention_bias"):
        raise UnsupportedModelError("attention_bias true has no code here")
    return ModelConfig(
        **_common(raw, eos_token_ids),
        num_experts=raw["num_experts"],
        moe_intermediate_size=raw["moe_intermediate_size"],
        norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
        qk_norm=True,
        mlp_prefix="mlp",
        expert_names=("gate_proj", "up_proj", "down_proj"),
    )


_READERS = {"MixtralForCausalLM": _read_mixtral, "Qwen3MoeForCausalLM": _read_qwen3_moe}
