"""On a GPU as on the CPU: a request's logits and tokens depend on nothing that runs beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lightmoe.core import SamplingParams, SamplingStep
from lightmoe.models.find import find_model
from lightmoe.worker import runner
from lightmoe.worker.device_sampler import sample_rows
from tests.gpus import half_dtypes
from tests.worker.groups import generate, new_config, recorded_logits, running_engine
from tests.worker.test_device_sampler import random_logits

pytestmark = pytest.mark.gpu

PROMPTS = [tuple((7 * one + 3 * place) % 3000 for place in range(3 + 29 * one)) for one in range(6)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


def logits_of_all(
    dtype: str, max_num_seqs: int, budget: int, num_kv_blocks: int | None = None
) -> tuple[list[np.ndarray], int]:
    """Every request's logits [positions, V] in one way to run them, and how many preemptions."""
    config = new_config(find_model("mixtral-lite"), 1, max_model_len=256, max_num_seqs=max_num_seqs)
    config = replace(config, device="cuda", dtype=dtype)
    if num_kv_blocks is not None:
        config = replace(config, num_kv_blocks=num_kv_blocks)
    with running_engine(config, max_num_seqs, budget) as engine, recorded_logits() as recorder:
        generate(engine, PROMPTS, PARAMS)
        preemptions = engine.stats().num_preemptions
    return [recorder.of_sequence(place) for place in range(len(PROMPTS))], preemptions


@pytest.fixture(autouse=True)
def _rows_pass_the_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "stays_on_device", lambda _: False)


@pytest.fixture(scope="module", params=half_dtypes())
def one_after_the_other(request: pytest.FixtureRequest) -> tuple[str, list[np.ndarray]]:
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(runner, "stays_on_device", lambda _: False)
        return request.param, logits_of_all(request.param, 1, 512)[0]


@pytest.mark.parametrize(
    ("max_num_seqs", "budget", "num_kv_blocks"), [(6, 512, None), (6, 7, None), (6, 64, 14)]
)
def test_the_way_requests_are_batched_changes_no_bit(
    one_after_the_other: tuple[str, list[np.ndarray]],
    max_num_seqs: int,
    budget: int,
    num_kv_blocks: int | None,
) -> None:
    dtype, wanted = one_after_the_other

    found, num_preemptions = logits_of_all(dtype, max_num_seqs, budget, num_kv_blocks)

    assert (num_preemptions > 0) is (num_kv_blocks is not None)
    for ours, alone in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, alone)


def test_the_device_chooses_the_tokens_of_the_host() -> None:
    steps = [
        SamplingStep(
            temperature=(0.0, 0.7, 1.3)[place % 3],
            top_p=(1.0, 0.9)[place % 2],
            top_k=(0, 0, 5, 50)[place % 4],
            min_p=(0.0, 0.0, 0.0, 0.0, 0.1)[place % 5],
            seed=place,
            position=place,
        )
        for place in range(120)
    ]
    logits = torch.from_numpy(random_logits(len(steps), seed=3))

    assert sample_rows(logits.cuda(), steps).tolist() == sample_rows(logits, steps).tolist()
