"""Tokens are the same with and without a topology, though other ranks compute them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightmoe.core import SamplingParams
from lightmoe.moe import route
from lightmoe.moe.placement import initial_placement
from tests.models.folders import write_model
from tests.worker.groups import generate, new_config, running_engine

PROMPTS = [tuple((7 * one + 3 * place) % 50 for place in range(5 + 8 * one)) for one in range(5)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def test_tokens_are_equal_with_and_without_a_topology(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = route.split_over_copies
    others: list[bool] = []  # for each route of a layer: whether other copies get the pairs

    def watched(counts: np.ndarray, *choices: object, nearness: route.Nearness = ()) -> np.ndarray:
        assigned = split(counts, *choices, nearness=nearness)
        others.append(bool((assigned != split(counts, *choices)).any()))
        return assigned

    monkeypatch.setattr(route, "split_over_copies", watched)
    config = new_config(write_model(tmp_path / "tiny", eos_token_id=None), num_ranks=5)
    layers, experts = len(config.placement.copies), config.model.num_experts
    spread = initial_placement(layers, experts, 5, replicas_per_layer=2 * experts)

    def tokens(nearness: tuple[tuple[int, ...], ...]) -> list[list[int]]:
        others.clear()
        told = replace(config, placement=spread, nearness=nearness)
        with running_engine(told, 4, 64) as engine:
            return generate(engine, PROMPTS, GREEDY)

    anywhere = tokens(())
    assert others
    assert not any(others)
    assert tokens(((0, 1, 0, 1, 0),)) == anywhere
    assert any(others)
