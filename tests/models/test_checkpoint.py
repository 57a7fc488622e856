"""Checkpoints that are whole are read; whatever is wrong with one is said with the file's name."""

from __future__ import annotations

import json
import pickle
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightmoe.errors import CheckpointError
from lightmoe.models.checkpoint import check_tensors, read_index
from lightmoe.models.config import read_config
from tests.models.folders import random_tensors, write_config, write_model, write_shards

GATE = "model.layers.0.block_sparse_moe.gate.weight"


def check(folder: Path) -> None:
    """What a launch checks before it starts anything."""
    check_tensors(read_index(folder), read_config(folder))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        check(folder)
    assert "\n" not in str(raised.value)


def raw_file(header: bytes, data: bytes = b"", claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + data


@pytest.mark.parametrize("write", [write_model, lambda folder: write_shards(folder, 3)])
def test_one_file_and_shards_are_read_alike(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    folder = write(tmp_path)
    check(folder)

    index = read_index(folder)

    assert index.shapes == dict(read_config(folder).all_tensors())
    for name, path in index.files.items():
        assert name in load_file(path)


def test_tied_heads_need_no_head(tmp_path: Path) -> None:
    check(write_model(tmp_path, tie_word_embeddings=True))
    assert "lm_head.weight" not in read_index(tmp_path).shapes

    write_config(tmp_path)
    refused(tmp_path, r"tensor lm_head\.weight is missing from the checkpoint")


def test_no_weights_at_all(tmp_path: Path) -> None:
    refused(write_config(tmp_path), r"no weights \(model\.safetensors\).*--load-format dummy")


def test_a_shard_that_the_index_names_is_missing(tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()

    refused(tmp_path, r"shard .*model-00002-of-00003\.safetensors is missing \(1 of 3 are\)")


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_named_with_its_size(tmp_path: Path, size: int) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:size])

    refused(tmp_path, rf"model\.safetensors has {len(whole[:size])} bytes.*fetch it again")


def test_bytes_that_nobody_asked_for_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")

    refused(tmp_path, r"its header says \d+; fetch it again")


@pytest.mark.parametrize("claimed", [2**60, 2**64 - 1, 2**31])
def test_a_huge_header_is_refused_before_memory_is_taken(tmp_path: Path, claimed: int) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(raw_file(b"{}", claimed=claimed))
    tracemalloc.start()

    refused(tmp_path, rf"has 10 bytes but a header of {claimed}")

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        b"[]",
        b'{"a": 5}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        b"[" * 100_000,
    ],
    ids=lambda header: str(header[:60]),
)
def test_a_broken_header_is_refused(tmp_path: Path, header: bytes) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, b"\0" * 4))

    refused(tmp_path, r"model\.safetensors has a broken header .*fetch it again")


def test_a_wrong_shape_names_tensor_file_and_both_shapes(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors[GATE] = torch.zeros(4, 24)
    save_file(tensors, path)

    refused(
        tmp_path,
        rf"tensor {re.escape(GATE)} in .*model\.safetensors has shape \[4, 24\],"
        r" config\.json says \[5, 24\]",
    )


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors[GATE]
    save_file(tensors, path)

    refused(tmp_path, rf"tensor {re.escape(GATE)} is missing from the checkpoint")


def test_a_dtype_that_is_not_read_is_named(tmp_path: Path) -> None:
    write_config(tmp_path)
    tensors = random_tensors(tmp_path)
    tensors[GATE] = tensors[GATE].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")

    refused(tmp_path, rf"tensor {re.escape(GATE)} in .* is I8; F32, F16, BF16 are read")


class Payload:
    """Writes a file if anybody unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "it ran"
    folder = write_config(tmp_path / "model")
    (folder / name).write_bytes(pickle.dumps(Payload(trace)))

    refused(folder, rf"has only pickle weights \({re.escape(name)}\).*convert them to safetensors")

    assert not trace.exists()
    pickle.loads((folder / name).read_bytes())
    assert trace.exists()  # the payload would have shown


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/model.safetensors", "part/model.safetensors", "model.bin"],
)
def test_an_index_reaches_only_safetensors_beside_it(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    folder = write_shards(tmp_path / "model", 2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    index["weight_map"][GATE] = name
    path.write_text(json.dumps(index), encoding="utf-8")

    refused(folder, rf"index\.json names '{re.escape(name)}'; only \.safetensors files beside it")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[]", "{"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, content: str) -> None:
    folder = write_shards(tmp_path, 2)
    (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")

    refused(folder, r"model\.safetensors\.index\.json")
