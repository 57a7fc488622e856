"""Pairs computed in each layer, noted chunk by chunk."""

from __future__ import annotations

import pytest
import torch

from lightmoe.moe.dispatch.pair_counter import PairCounter


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ([0, 1, 2], [1, 2, 3]),
        ([0, 0, 1, 1, 2, 2], [3, 7, 11]),
        ([0, 2, 2, 0], [5, 0, 5]),
        ([1], [0, 1, 0]),
        ([0, 0, 0, 1, 1, 2], [6, 9, 6]),
        ([], [0, 0, 0]),
    ],
    ids=str,
)
def test_pairs_of_all_chunks_count(layers: list[int], wanted: list[int]) -> None:
    counter = PairCounter(3, torch.device("cpu"))
    for number, layer in enumerate(layers, 1):
        counter.note(layer, torch.tensor([0, number // 2, number], dtype=torch.int32))

    counter.count()

    assert counter.move().tolist() == wanted
    assert counter.move().tolist() == [0, 0, 0]
