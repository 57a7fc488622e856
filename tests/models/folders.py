"""Model folders made up here: small, random, and as broken as a test wants them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightmoe.models.config import read_config

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 20,
    "max_position_embeddings": 128,
    "model_type": "mixtral",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 50,
}


def write_config(folder: Path, **changes: object) -> Path:
    """A small Mixtral's config.json with changes; a value of ... leaves the key out."""
    raw = {name: value for name, value in (MIXTRAL | changes).items() if value is not ...}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def random_tensors(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor that the folder's config.json asks for."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in read_config(folder).all_tensors():
        values = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        tensors[name] = (values + (len(shape) == 1)).to(dtype)
    return tensors


def write_model(folder: Path, **changes: object) -> Path:
    """A small random Mixtral in one file."""
    write_config(folder, **changes)
    save_file(random_tensors(folder), folder / "model.safetensors")
    return folder


def write_shards(folder: Path, num_shards: int, **changes: object) -> Path:
    """The same in several files with an index; neighbours in the list are in different files."""
    write_config(folder, **changes)
    tensors = random_tensors(folder)
    names = [f"model-{one + 1:05}-of-{num_shards:05}.safetensors" for one in range(num_shards)]
    weight_map = {name: names[place % num_shards] for place, name in enumerate(tensors)}
    for file in names:
        part = {name: tensors[name] for name, where in weight_map.items() if where == file}
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
