"""The decoder in 16 bits through liblight_ops: near float32, and without a wait for the GPU."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightmoe.core import SequenceStep
from lightmoe.kernels.library import read_manifest, using
from lightmoe.layers.attention import AttentionStep, KVCache
from lightmoe.models.checkpoint import read_index
from lightmoe.models.config import read_config
from lightmoe.models.decoder import Decoder, Parts, load_experts
from lightmoe.models.find import find_model
from lightmoe.models.weights import SafetensorsReader
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.moe.gate import Choice, Gate, PairSort
from lightmoe.moe.placement import initial_placement
from lightmoe.server.tokenizer import Tokenizer
from lightmoe.worker.config import BLOCK_SIZE
from lightmoe.worker.inputs import step_inputs
from tests.gpus import half_dtypes
from tests.models.folders import random_tensors

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
SMALL = {
    "qwen3-30b-a3b": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "moe_intermediate_size": 64,
    },
    "deepseek-v2-lite": {
        "num_attention_heads": 4,
        "n_routed_experts": 16,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
    },
}


class Loaded:
    """A model on the GPU, and prompts that each begin at position 0 of their own pages."""

    def __init__(
        self, folder: Path, dtype_name: str, prompts: list[list[int]], **settings: object
    ) -> None:
        config, dtype = read_config(folder), getattr(torch, dtype_name)
        layers = len(config.moe_layers)
        placement = initial_placement(layers, config.num_experts, 1)
        group = ExpertGroup(0, placement, None, "none", np.zeros(layers, dtype=np.int64))
        read = SafetensorsReader(read_index(folder), dtype, DEVICE)
        pool = load_experts(config, read, group, dtype, DEVICE)
        parts = Parts(config=config, read=read, group=group, pool=pool, **settings)
        num_blocks = max(map(len, prompts)) // BLOCK_SIZE + 1
        self.decoder = Decoder(parts, num_blocks * BLOCK_SIZE)
        self.cache = KVCache(
            config.num_hidden_layers,
            num_blocks * len(prompts),
            BLOCK_SIZE,
            *config.cache_shape,
            dtype,
            DEVICE,
        )
        self.sequences = [
            SequenceStep(
                one, tuple(prompt), 0, tuple(range(one * num_blocks, (one + 1) * num_blocks))
            )
            for one, prompt in enumerate(prompts)
        ]

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Of all positions [T, V], in one step."""
        inputs = step_inputs(self.sequences, self.cache, self.decoder.rotary)
        hidden = self.decoder.forward(inputs.token_ids, inputs.attention)
        return self.decoder.logits(hidden)


@dataclass(frozen=True)
class Forward:
    """Logits [T, V] of all positions, and the experts [T, K] of each layer, best first."""

    logits: Tensor
    experts: list[Tensor]


def forward(
    folder: Path,
    dtype: str,
    prompts: list[list[int]],
    replayed: list[Tensor] | None = None,
    **settings: object,
) -> Forward:
    """One step over whole prompts; with `replayed` tokens go to these experts, whatever scores say.

    A token that goes elsewhere is another function of its prompt, and so is, by attention, every
    later one: two dtypes can only be compared on the same experts.
    """
    loaded = Loaded(folder, dtype, prompts, **settings)
    experts: list[Tensor] = []
    choose = Gate.__call__

    def chosen(gate: Gate, hidden: Tensor, sort: PairSort | None = None) -> Choice:
        choice = choose(gate, hidden, sort)
        if replayed is not None:
            given = replayed[len(experts)]
            choice = Choice(given, weights_of(gate, hidden, given))
        experts.append(choice.experts.long())
        return choice

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gate, "__call__", chosen)
        logits = loaded.logits()
    assert logits.dtype == torch.float32
    return Forward(logits, experts)


def weights_of(gate: Gate, hidden: Tensor, experts: Tensor) -> Tensor:
    """What a softmax router gives to experts [T, K] that others chose."""
    scores = (hidden.float() @ gate.router_weight.float().t()).softmax(dim=1).gather(1, experts)
    if gate.how["renormalize"]:
        scores = scores / scores.sum(dim=1, keepdim=True)
    return scores * gate.how["scale"]


def share_elsewhere(found: Forward, wanted: Forward) -> float:
    """The share of tokens whose experts differ in some layer, in whatever order."""
    same = [
        (ours.sort(dim=1).values == theirs.sort(dim=1).values).all(dim=1)
        for ours, theirs in zip(found.experts, wanted.experts, strict=True)
    ]
    return 1.0 - float(torch.stack(same).all(dim=0).float().mean())


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Every position within 3e-2, and the same best token wherever it is ahead by 0.25."""
    difference = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert difference.max() <= 3e-2
    best = wanted.topk(2, dim=1)
    clear = best.values[:, 0] - best.values[:, 1] > 0.25
    assert clear.any()
    assert torch.equal(found.argmax(dim=1)[clear], best.indices[clear, 0])


@pytest.fixture(scope="module")
def lite() -> tuple[Path, list[list[int]]]:
    """mixtral-lite and four pieces of its held-out text."""
    folder = find_model("mixtral-lite")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    tokens = tokenizer.encode((folder / "heldout.txt").read_text(encoding="utf-8")[:20000])
    return folder, [tokens[start : start + 200] for start in range(0, 800, 200)]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", half_dtypes())
def test_sixteen_bits_stay_near_float32(
    lite: tuple[Path, list[list[int]]], dtype: str, deterministic: bool
) -> None:
    folder, prompts = lite

    found = forward(folder, dtype, prompts, deterministic=deterministic)

    free = forward(folder, "float32", prompts)
    assert share_elsewhere(found, free) <= 0.05
    assert_near(found.logits, forward(folder, "float32", prompts, found.experts).logits)


@pytest.fixture(params=sorted(SMALL))
def made_up(request: pytest.FixtureRequest, tmp_path: Path, checkout: Path) -> Path:
    """A folder with three narrow layers of an architecture and random weights."""
    raw = json.loads(
        (checkout / "models" / request.param / "config.json").read_text(encoding="utf-8")
    )
    raw |= {"num_hidden_layers": 3, "hidden_size": 128, "vocab_size": 504, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(raw | SMALL[request.param]), encoding="utf-8")
    # Rounded already, so that all dtypes begin with the same numbers.
    save_file(random_tensors(tmp_path, torch.bfloat16), tmp_path / "model.safetensors")
    return tmp_path


# The scores of a made-up router are nearer to each other than a trained one's: tokens that choose
# other experts are not counted here.
@pytest.mark.parametrize("dtype", half_dtypes())
def test_other_architectures_stay_near_float32(made_up: Path, dtype: str) -> None:
    prompts = [[(7 * one + 3 * place) % 400 for place in range(40)] for one in range(3)]

    found = forward(made_up, dtype, prompts)

    assert_near(found.logits, forward(made_up, "float32", prompts, found.experts).logits)


@pytest.mark.parametrize("dtype", half_dtypes())
def test_one_token_alone_stays_near_float32(made_up: Path, dtype: str) -> None:
    """The strides of a dimension of one are anything: every view of one row must be taken."""
    found = forward(made_up, dtype, [[7]])

    wanted = forward(made_up, "float32", [[7]], found.experts).logits
    assert (found.logits - wanted).norm() <= 3e-2 * wanted.norm()


def test_the_turing_road_stays_near_float32(lite: tuple[Path, list[list[int]]]) -> None:
    """The PTX of compute_75, which the driver compiles for a newer card."""
    manifest = read_manifest()
    if manifest is None or "75ptx" not in manifest.kernels:
        pytest.skip("no 75ptx here; build it: make kernels ARCHS=native,75ptx")
    folder, prompts = lite

    with using(architecture="75ptx"):
        found = forward(folder, "float16", prompts)

    assert_near(found.logits, forward(folder, "float32", prompts, found.experts).logits)


@pytest.mark.parametrize("num_tokens", [1, 200])
def test_the_host_runs_ahead_of_the_gpu(
    lite: tuple[Path, list[list[int]]], num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer reads anything back, whoever decodes and however long the prompts are."""
    loaded = Loaded(lite[0], half_dtypes()[0], [prompt[:num_tokens] for prompt in lite[1]])
    loaded.logits()  # kernels are loaded
    enqueue, watched = Decoder.forward, []

    def forward(self: Decoder, token_ids: Tensor, step: AttentionStep) -> Tensor:
        with no_waiting():
            hidden = enqueue(self, token_ids, step)
        watched.append(hidden)
        return hidden

    monkeypatch.setattr(Decoder, "forward", forward)
    loaded.logits()

    assert len(watched) == 1


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever of torch waits for the GPU meanwhile is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
