"""Readers: a rank reads what it hosts and no more; weights made up are the same everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightmoe.errors import CheckpointError
from lightmoe.models.checkpoint import read_index
from lightmoe.models.config import read_config
from lightmoe.models.decoder import Decoder, Parts, load_experts
from lightmoe.models.weights import DummyReader, SafetensorsReader
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.moe.placement import initial_placement
from tests.models.folders import random_tensors, write_config, write_model, write_shards

CPU = torch.device("cpu")


def read_as_rank(folder: Path, rank: int, num_ranks: int) -> SafetensorsReader:
    """Everything that a rank reads at its start, and its slots checked against the file."""
    config = read_config(folder)
    placement = initial_placement(
        config.num_hidden_layers, config.num_experts, num_ranks, num_spares=1, replicas_per_layer=3
    )
    group = ExpertGroup(rank, placement, None, "waterfill", np.zeros(config.num_hidden_layers))
    reader = SafetensorsReader(read_index(folder), torch.float32, CPU)
    pool = load_experts(config, reader, group, torch.float32, CPU)
    parts = Parts(config=config, read=reader, group=group, pool=pool)
    Decoder(parts, max_model_len=32)
    tensors = random_tensors(folder)
    for layer, expert, slot in placement.hosted(rank):
        gate, up, down = (tensors[config.expert_tensor(layer, expert, part)] for part in range(3))
        assert torch.equal(pool.gate_up[slot], torch.cat([gate, up]))
        assert torch.equal(pool.down[slot], down)
    return reader


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_reads_dense_weights_and_its_own_experts_only(
    tmp_path: Path, num_shards: int, rank: int
) -> None:
    folder = write_model(tmp_path) if num_shards == 1 else write_shards(tmp_path, num_shards)
    config = read_config(folder)

    names = read_as_rank(folder, rank, num_ranks=3).names_read

    placement = initial_placement(
        config.num_hidden_layers, config.num_experts, 3, num_spares=1, replicas_per_layer=3
    )
    experts = [
        name
        for layer, expert, _ in placement.hosted(rank)
        for name, _ in config.expert_tensors(layer, expert)
    ]
    dense = [name for name, _ in config.dense_tensors()]
    assert sorted(names) == sorted([*dense, *experts])
    assert len(experts) < len(dict(config.all_tensors())) - len(dense)


def test_two_homes_read_different_experts(tmp_path: Path) -> None:
    folder = write_model(tmp_path)

    first, second = (
        {name for name in read_as_rank(folder, rank, 3).names_read if ".experts." in name}
        for rank in (0, 1)
    )

    assert first
    assert second
    assert not first & second


def test_tensors_come_in_the_dtype_of_the_rank(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"

    tensor = SafetensorsReader(read_index(folder), torch.bfloat16, CPU)(name)

    assert torch.equal(tensor, random_tensors(folder)[name].to(torch.bfloat16))


def test_a_file_that_goes_away_after_the_check_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    index = read_index(folder)
    (folder / "model.safetensors").write_bytes(b"gone")

    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read at lm_head"):
        SafetensorsReader(index, torch.float32, CPU)("lm_head.weight")


def test_made_up_weights_depend_on_name_and_seed_only(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path))
    names = [name for name, _ in config.all_tensors()]
    one, other = (DummyReader(config, 0, torch.float32, CPU) for _ in range(2))
    reseeded = DummyReader(config, 1, torch.float32, CPU)

    first = {name: one(name) for name in names}

    # Another rank reads other tensors, in another order.
    for name in names[::-2]:
        assert torch.equal(other(name), first[name])
    for name, shape in config.all_tensors():
        tensor = first[name]
        assert tuple(tensor.shape) == shape
        if len(shape) == 1:
            assert (tensor == 1).all()
        else:
            assert not torch.equal(reseeded(name), tensor)
            assert tensor.abs().max() <= (3 / shape[-1]) ** 0.5
            assert tensor.std() == pytest.approx(shape[-1] ** -0.5, rel=0.25)
    matrices = [tensor for tensor in first.values() if tuple(tensor.shape) == (20, 24)]
    assert len({tuple(tensor.flatten().tolist()) for tensor in matrices}) == len(matrices)
