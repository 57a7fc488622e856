"""config.json read into a ModelConfig, or refused by name. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightmoe.errors import CheckpointError, UnsupportedModelError
from lightmoe.layers.yarn import Yarn, magnitude
from lightmoe.models.model_config import MLAConfig, ModelConfig

__all__ = ["ModelConfig", "read_config", "read_json"]


def read_config(folder: Path) -> ModelConfig:
    """Read config.json; CheckpointError when broken, UnsupportedModelError when foreign."""
    raw = read_json(folder / "config.json")
    listed = raw.get("architectures")
    names = [*(listed if isinstance(listed, list) else []), "of no named architecture"]
    architecture = str(names[0])
    reader = _READERS.get(architecture)
    if reader is None:
        raise UnsupportedModelError(
            f"{folder.name} is {architecture}; the architectures served are"
            f" {', '.join(sorted(_READERS))}"
        )
    try:
        config = reader(raw, _eos_token_ids(folder, raw))
    except KeyError as error:
        raise CheckpointError(
            f"{folder / 'config.json'} lacks {error}; take a complete config.json"
        ) from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} has a value of the wrong kind ({error});"
            " take the model's own config.json"
        ) from error
    for token in config.eos_token_ids:
        if not 0 <= token < config.vocab_size:
            raise CheckpointError(
                f"{folder.name}'s eos_token_id {token} is not among its {config.vocab_size} tokens;"
                " take the model's own generation_config.json"
            )
    return config


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


def _rope(raw: dict[str, Any], served_types: tuple[str, ...]) -> dict[str, Any]:
    """Rotary parameters in today's spelling; older files have rope_scaling beside rope_theta."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    unnamed = "with no type" if raw.get("rope_scaling") else "default"
    rope_type = rope.get("rope_type") or rope.get("type") or unnamed
    if rope_type not in served_types:
        raise UnsupportedModelError(
            f"rope scaling {rope_type!r} has no code here; served: {', '.join(served_types)}"
        )
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1):
        raise UnsupportedModelError("partial_rotary_factor has no code here; only 1 is served")
    return {
        **rope,
        "rope_type": rope_type,
        "rope_theta": float(rope.get("rope_theta") or raw["rope_theta"]),
    }


def _yarn(rope: dict[str, Any]) -> Yarn:
    if not rope.get("truncate", True):
        raise UnsupportedModelError("yarn with truncate false has no code here")
    factor = float(rope["factor"])
    mscale, mscale_all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    table_scale = rope.get("attention_factor")
    if table_scale is None and mscale and mscale_all_dim:
        table_scale = magnitude(factor, mscale) / magnitude(factor, mscale_all_dim)
    return Yarn(
        factor=factor,
        original_max_position_embeddings=rope["original_max_position_embeddings"],
        beta_fast=rope.get("beta_fast") or 32,
        beta_slow=rope.get("beta_slow") or 1,
        table_scale=magnitude(factor, 1.0) if table_scale is None else table_scale,
        mscale_all_dim=mscale_all_dim,
    )


def _common(
    raw: dict[str, Any],
    eos_token_ids: tuple[int, ...],
    rope_types: tuple[str, ...] = ("default",),
) -> dict[str, Any]:
    heads = raw["num_attention_heads"]
    rope = _rope(raw, rope_types)
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
        "rope_theta": rope["rope_theta"],
        "yarn": _yarn(rope) if rope["rope_type"] == "yarn" else None,
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
        # transformers 5 saves the published files' num_experts under the second name.
        num_experts=raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"],
        moe_intermediate_size=raw["moe_intermediate_size"],
        norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
        qk_norm=True,
        mlp_prefix="mlp",
        expert_names=("gate_proj", "up_proj", "down_proj"),
    )


_DEEPSEEK_V2_SERVED: dict[str, tuple[Any, ...]] = {
    "topk_method": ("greedy", "group_limited_greedy"),
    "scoring_func": ("softmax",),
    # The two public implementations disagree on what true means beside a scaling factor.
    "norm_topk_prob": (False,),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}


def _read_deepseek_v2(raw: dict[str, Any], eos_token_ids: tuple[int, ...]) -> ModelConfig:
    for name, served in _DEEPSEEK_V2_SERVED.items():
        if raw.get(name) is not None and raw[name] not in served:
            raise UnsupportedModelError(
                f"{name} {raw[name]!r} has no code here; served: {', '.join(map(str, served))}"
            )
    num_dense_layers = raw.get("first_k_dense_replace") or 0
    if num_dense_layers >= raw["num_hidden_layers"]:
        raise UnsupportedModelError(
            f"first_k_dense_replace {num_dense_layers} leaves no layer with experts"
            f" of {raw['num_hidden_layers']}; dense models are not served"
        )
    mla = MLAConfig(
        q_lora_rank=raw["q_lora_rank"],
        kv_lora_rank=raw["kv_lora_rank"],
        qk_nope_head_dim=raw["qk_nope_head_dim"],
        qk_rope_head_dim=raw["qk_rope_head_dim"],
        v_head_dim=raw["v_head_dim"],
    )
    return ModelConfig(
        **{**_common(raw, eos_token_ids, ("default", "yarn")), "head_dim": mla.query_dim},
        **_expert_groups(raw),
        num_experts=raw["n_routed_experts"],
        moe_intermediate_size=raw["moe_intermediate_size"],
        norm_topk_prob=False,
        qk_norm=False,
        mlp_prefix="mlp",
        expert_names=("gate_proj", "up_proj", "down_proj"),
        first_k_dense_replace=num_dense_layers,
        intermediate_size=raw["intermediate_size"],
        num_shared_experts=raw.get("n_shared_experts") or 0,
        routed_scaling_factor=float(raw.get("routed_scaling_factor", 1.0)),
        float32_router=True,
        mla=mla,
    )


def _expert_groups(raw: dict[str, Any]) -> dict[str, Any]:
    if raw.get("topk_method") != "group_limited_greedy":
        return {}
    num_experts, num_groups, kept = raw["n_routed_experts"], raw["n_group"], raw["topk_group"]
    # kept groups of num_experts / num_groups experts each
    if num_experts % num_groups or kept * num_experts < raw["num_experts_per_tok"] * num_groups:
        raise CheckpointError(
            f"config.json asks for {raw['num_experts_per_tok']} experts from {kept} of {num_groups}"
            f" groups of {num_experts} experts, which cannot be; take the model's own config.json"
        )
    return {"num_expert_groups": num_groups, "num_groups_per_token": kept}


_READERS = {
    "DeepseekV2ForCausalLM": _read_deepseek_v2,
    "MixtralForCausalLM": _read_mixtral,
    "Qwen3MoeForCausalLM": _read_qwen3_moe,
}
