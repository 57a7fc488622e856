"""DeepSeek-V2 against transformers: tiny random models in every shape that the family has."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from lightmoe import kernels
from lightmoe.core import ModelInfo, Request, SampledToken, SamplingParams
from lightmoe.engine.engine import Engine, SchedulerConfig
from lightmoe.errors import CheckpointError, UnsupportedModelError
from lightmoe.layers.basic import HeadLinear
from lightmoe.models.checkpoint import check_tensors, read_index
from lightmoe.models.config import ModelConfig, read_config
from lightmoe.models.decoder import Decoder
from lightmoe.moe.placement import initial_placement
from lightmoe.worker.config import WorkerConfig
from lightmoe.worker.local_group import LocalWorkerGroup
from lightmoe.worker.sizing import Demand, size_ranks

VOCABULARY = 300
NUM_EXPERTS = 8
MAX_MODEL_LEN = 128
NUM_NEW_TOKENS = 16

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "max_position_embeddings": 256,
    # Far from the norms inside latent attention, whose epsilon is another.
    "rms_norm_eps": 1e-2,
    "initializer_range": 0.2,
}
# The two longest prompts below go beyond the original context.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "lite": {"rope_parameters": YARN},
    "plain": {"first_k_dense_replace": 0, "n_shared_experts": 1, "num_hidden_layers": 2},
    "v2": {**GROUPS, "q_lora_rank": 32, "routed_scaling_factor": 4.0, "rope_parameters": YARN},
}


def save_model(folder: Path, **changes: Any) -> DeepseekV2ForCausalLM:
    """A random model, norms included, with its checkpoint in `folder`."""
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, DeepseekV2ForCausalLM]:
    """Each variant's folder and transformers' model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_model(folder, **VARIANTS[request.param])


@contextmanager
def engine_of(
    folder: Path, num_ranks: int, load_format: Any = "auto", dtype: str = "float32"
) -> Iterator[Engine]:
    """An engine over ranks that are threads."""
    model = read_config(folder)
    placement = initial_placement(len(model.moe_layers), model.num_experts, num_ranks)
    workers = LocalWorkerGroup(
        WorkerConfig(
            model=model,
            folder=folder,
            load_format=load_format,
            placement=placement,
            route="waterfill",
            device="cpu",
            dtype=dtype,
            max_model_len=MAX_MODEL_LEN,
            num_kv_blocks=48,
            num_threads=1,
            seed=0,
        )
    )
    info = ModelInfo(
        name="tiny",
        folder=str(folder),
        architecture=model.architecture,
        num_layers=len(model.moe_layers),
        num_experts=model.num_experts,
        vocab_size=model.vocab_size,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(),
        generation_defaults={},
    )
    # Few tokens a step: the longer prompts are prefilled in chunks beside other sequences.
    engine = Engine(info, workers, SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=24))
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def prompts_of(*lengths: int) -> list[tuple[int, ...]]:
    """Random token ids."""
    generator = np.random.default_rng(1)
    return [tuple(generator.integers(0, VOCABULARY, size=length).tolist()) for length in lengths]


def generate(engine: Engine, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """Greedy tokens of prompts that all run at once."""
    outputs: queue.Queue[Any] = queue.Queue()
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS)
    for number, prompt in enumerate(prompts):
        request = Request(request_id=str(number), prompt_token_ids=prompt, params=params)
        engine.submit(request, outputs.put)
    tokens: dict[str, list[SampledToken]] = {}
    num_open = len(prompts)
    while num_open:
        output = outputs.get(timeout=60)
        assert output.error is None, output.error
        tokens.setdefault(output.request_id, []).extend(output.tokens)
        num_open -= output.finish_reason is not None
    return [[token.token_id for token in tokens[str(number)]] for number in range(len(prompts))]


def reference(
    model: DeepseekV2ForCausalLM, prompt: tuple[int, ...]
) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy tokens and the logits [tokens, vocabulary] that they were chosen by."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences[0, len(prompt) :].tolist(), torch.cat(found.logits)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_tokens_and_logits_are_those_of_transformers(
    saved: tuple[Path, DeepseekV2ForCausalLM], num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = saved
    prompts = prompts_of(1, 5, 17, 42, 90)
    computed: list[torch.Tensor] = []
    compute = Decoder.logits

    def record(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        computed.append(compute(decoder, hidden))
        return computed[-1]

    expected = [reference(model, prompt) for prompt in prompts]
    with engine_of(folder, num_ranks) as engine:
        assert generate(engine, prompts) == [tokens for tokens, _ in expected]
        monkeypatch.setattr(Decoder, "logits", record)
        for prompt, (_, logits) in zip(prompts, expected, strict=True):
            computed.clear()
            generate(engine, [prompt])
            assert (torch.cat(computed) - logits).abs().max() < 1e-4


def test_load_counts_the_layers_that_have_experts(
    saved: tuple[Path, DeepseekV2ForCausalLM],
) -> None:
    folder, model = saved
    num_moe_layers = model.config.num_hidden_layers - model.config.first_k_dense_replace
    with engine_of(folder, 2) as engine:
        generate(engine, prompts_of(20))
        load = engine.load()
    # The last token is chosen but never run.
    num_pairs = (20 + NUM_NEW_TOKENS - 1) * model.config.num_experts_per_tok
    assert load.expert_tokens.sum(axis=1).tolist() == [num_pairs] * num_moe_layers
    assert load.rank_pairs.sum(axis=0).tolist() == [num_pairs] * num_moe_layers


def test_tokens_do_not_depend_on_what_runs_beside(
    saved: tuple[Path, DeepseekV2ForCausalLM],
) -> None:
    folder, _ = saved
    prompts = prompts_of(3, 8, 20, 11)
    with engine_of(folder, 2) as engine:
        assert generate(engine, prompts) == [generate(engine, [prompt])[0] for prompt in prompts]


def test_names_and_shapes_are_those_of_the_checkpoint(
    saved: tuple[Path, DeepseekV2ForCausalLM],
) -> None:
    folder, _ = saved
    index, config = read_index(folder), read_config(folder)
    check_tensors(index, config)
    assert dict(config.all_tensors()) == index.shapes


def test_dummy_weights_run_with_a_float32_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = kernels.topk_gate
    dtypes: set[tuple[torch.dtype, torch.dtype]] = set()

    def record(hidden: torch.Tensor, router: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        dtypes.add((hidden.dtype, router.dtype))
        return choose(hidden, router, *args, **kwargs)

    monkeypatch.setattr(kernels, "topk_gate", record)
    write_config(tmp_path)
    with engine_of(tmp_path, 2, load_format="dummy", dtype="bfloat16") as engine:
        (tokens,) = generate(engine, prompts_of(9))
    assert len(tokens) == NUM_NEW_TOKENS
    assert dtypes == {(torch.bfloat16, torch.float32)}


LEGACY = {
    **BASE,
    "architectures": ["DeepseekV2ForCausalLM"],
    "rope_theta": 10000,
    "rope_scaling": {
        **{name: value for name, value in YARN.items() if not name.startswith("rope")},
        "type": "yarn",
    },
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "moe_layer_freq": 1,
    "topk_method": "greedy",
}


def write_config(folder: Path, **changes: Any) -> None:
    """A config.json as DeepSeek published them, before rope_parameters."""
    (folder / "config.json").write_text(json.dumps({**LEGACY, **changes}), encoding="utf-8")


def test_both_spellings_of_rope_read_the_same(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    save_model(tmp_path / "new", rope_parameters=YARN, eos_token_id=None)
    write_config(tmp_path / "old")
    assert read_config(tmp_path / "old") == read_config(tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ({"norm_topk_prob": True}, "norm_topk_prob True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace 3 leaves no layer"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling 'linear'"),
        ({"rope_scaling": {"factor": 2}}, "rope scaling 'with no type'"),
        ({"rope_scaling": {**LEGACY["rope_scaling"], "truncate": False}}, "truncate false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_has_no_code_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**GROUPS, "n_group": 3}, "3 experts from 2 of 3 groups of 8 experts"),
        ({**GROUPS, "topk_group": 1}, "3 experts from 1 of 4 groups of 8 experts"),
        ({**GROUPS, "n_group": None}, "wrong kind"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
    ],
)
def test_config_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def lite(checkout: Path) -> ModelConfig:
    """The config of the folder that ships with the repository."""
    return read_config(checkout / "models" / "deepseek-v2-lite")


def test_lite_has_the_parameters_of_deepseek_v2_lite(checkout: Path) -> None:
    config = lite(checkout)
    raw = json.loads((checkout / "models/deepseek-v2-lite/config.json").read_text("utf-8"))
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**raw))
    num_experts = len(config.moe_layers) * config.num_experts
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert config.dense_elements + num_experts * config.expert_elements == expected
    assert list(config.moe_layers) == list(range(1, 27))


def test_lite_caches_latents(checkout: Path) -> None:
    config = lite(checkout)
    assert config.cache_elements_per_position == 27 * (512 + 64)
    sizing = size_ranks(
        Demand(
            model=config,
            num_ranks=10,
            num_spares=2,
            element_bytes=2,
            rank_bytes=10 << 30,
            max_model_len=4096,
            max_num_seqs=1,
            on_cpu=False,
        )
    )
    assert sizing.cache_bytes == 4096 * config.cache_elements_per_position * 2
    assert sizing.placement.num_layers == 26


def test_group_limited_choice_by_hand() -> None:
    scores = torch.tensor([[0.05, 0.30, 0.15, 0.10, 0.25, 0.02, 0.06, 0.07]])
    hidden, router = scores.log(), torch.eye(8)
    experts, weights = kernels.topk_gate(
        hidden, router, 3, renormalize=False, scale=2.0, num_groups=4, num_groups_per_token=2
    )
    # Groups 0 (best 0.30) and 2 (0.25) stay; 0.15 and 0.10 lie in group 1.
    assert experts.tolist() == [[1, 4, 0]]
    torch.testing.assert_close(weights, torch.tensor([[0.6, 0.5, 0.1]]))


def test_groups_that_tie_go_to_the_lowest() -> None:
    hidden, router = torch.zeros(2, 8), torch.eye(8)
    experts, _ = kernels.topk_gate(
        hidden, router, 4, renormalize=False, num_groups=4, num_groups_per_token=2
    )
    assert experts.tolist() == [[0, 1, 2, 3]] * 2


def test_a_float32_router_computes_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator).bfloat16()
    router = torch.randn(8, 64, generator=generator).bfloat16().float()
    experts, weights = kernels.topk_gate(hidden, router, 3, renormalize=False)
    expected = kernels.topk_gate(hidden.float(), router, 3, renormalize=False)
    assert torch.equal(experts, expected[0])
    assert torch.equal(weights, expected[1])


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17, 40])
def test_products_per_head_do_not_depend_on_the_rows_beside(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    product = HeadLinear(torch.randn(4, 24, 128, generator=generator))
    heads = torch.randn(40, 4, 128, generator=generator)
    assert torch.equal(product(heads[:num_tokens]), product(heads)[:num_tokens])
