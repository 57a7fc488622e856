"""config.json: what is read, what is refused and by which name; and where folders are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightmoe.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from lightmoe.models.config import read_config
from lightmoe.models.find import find_model, generation_defaults
from tests.models.folders import write_config

QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_local_experts": ...,
    "num_experts": 6,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
}


def test_mixtral_is_read_as_it_says(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path))

    assert (config.num_experts, config.num_experts_per_tok) == (5, 2)
    assert (config.moe_intermediate_size, config.norm_topk_prob) == (20, True)
    assert config.eos_token_ids == (2,)
    assert config.expert_tensor(1, 4, 2) == "model.layers.1.block_sparse_moe.experts.4.w2.weight"
    shapes = dict(config.all_tensors())
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (16, 24)
    assert shapes["model.layers.0.block_sparse_moe.experts.0.w2.weight"] == (24, 20)
    assert shapes["lm_head.weight"] == (50, 24)
    # Per layer two norms, four projections, a router, and three matrices an expert.
    assert len(shapes) == 2 * (2 + 4 + 1 + 5 * 3) + 3


def test_qwen3_moe_has_query_and_key_norms(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, **QWEN3))

    assert (config.num_experts, config.moe_intermediate_size) == (6, 12)
    assert config.expert_tensor(0, 3, 1) == "model.layers.0.mlp.experts.3.up_proj.weight"
    assert dict(config.dense_tensors())["model.layers.1.self_attn.q_norm.weight"] == (8,)


def test_sizes_count_every_tensor_once(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path))

    def elements(shape: tuple[int, ...]) -> int:
        return shape[0] * (shape[1] if len(shape) > 1 else 1)

    total = sum(elements(shape) for _, shape in config.all_tensors())
    assert config.dense_elements + 2 * 5 * config.expert_elements == total


def test_head_dim_and_kv_heads_have_defaults(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, head_dim=..., num_key_value_heads=...))

    assert (config.head_dim, config.num_key_value_heads) == (24 // 4, 4)


def test_generation_config_has_the_last_word_on_the_end(tmp_path: Path) -> None:
    write_config(tmp_path)
    generation = {"eos_token_id": [2, 9], "do_sample": False, "temperature": 0.7, "top_k": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")

    assert read_config(tmp_path).eos_token_ids == (2, 9)
    assert generation_defaults(tmp_path) == {"temperature": 0.0}


def test_generation_defaults_are_the_sampling_fields(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}
    generation = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_length": 9, "min_p": "x"}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")

    assert generation_defaults(tmp_path) == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "num_local_experts", "rope_theta", "rms_norm_eps"]
)
def test_a_missing_key_is_named(tmp_path: Path, name: str) -> None:
    write_config(tmp_path, **{name: ...})

    with pytest.raises(CheckpointError, match=rf"config\.json lacks '{name}'"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "is LlamaForCausalLM; .*MixtralForCausalLM"),
        ({"architectures": ...}, "is of no named architecture; .*Qwen3MoeForCausalLM"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling .*linear"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope scaling .*llama3"),
        ({"sliding_window": 4096}, "sliding_window 4096 has no code here"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' has no code here"),
        ({**QWEN3, "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({**QWEN3, "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({**QWEN3, "attention_bias": True}, "attention_bias"),
    ],
)
def test_what_has_no_code_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_config(tmp_path, **changes)

    with pytest.raises(UnsupportedModelError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[1, 2]", "holds a list; a JSON object is needed"),
    ],
)
def test_a_broken_config_is_refused_by_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(CheckpointError, match=rf"config\.json {message}"):
        read_config(tmp_path)


def test_a_missing_config_is_refused_by_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "num_layers", "num_experts", "billions"),
    [
        ("mixtral-8x7b", 32, 8, 46.7),
        ("mixtral-8x22b", 56, 8, 140.6),
        ("qwen3-30b-a3b", 48, 128, 30.5),
    ],
)
def test_the_configs_that_come_along_have_the_published_sizes(
    checkout: Path, name: str, num_layers: int, num_experts: int, billions: float
) -> None:
    config = read_config(checkout / "models" / name)

    experts = num_layers * num_experts * config.expert_elements
    assert (config.num_hidden_layers, config.num_experts) == (num_layers, num_experts)
    assert (config.dense_elements + experts) / 1e9 == pytest.approx(billions, abs=0.05)


def test_models_are_found_by_path_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, named = tmp_path / "here", tmp_path / "named"
    write_config(here / "models" / "first")
    write_config(named / "second")
    monkeypatch.chdir(here)
    monkeypatch.setenv("LIGHTMOE_MODELS", str(named))

    assert find_model("models/first") == here / "models" / "first"
    assert find_model("first") == here / "models" / "first"
    assert find_model("second") == named / "second"
    assert find_model(str(named / "second")) == named / "second"
    assert find_model("mixtral-lite").name == "mixtral-lite"


def test_an_unknown_model_lists_those_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path / "models" / "first")
    write_config(tmp_path / "models" / "second")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ModelNotFoundError, match=r"no model named 'thrid'; found: .*first.*second"):
        find_model("thrid")


def test_a_folder_without_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        find_model(str(tmp_path))
