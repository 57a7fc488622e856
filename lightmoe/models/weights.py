"""Tensors of a model, read one by one: a rank reads only what it hosts.

`SafetensorsReader` reads a checkpoint, `DummyReader` makes weights up from their names.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightmoe.errors import CheckpointError
from lightmoe.models.checkpoint import CheckpointIndex
from lightmoe.models.config import ModelConfig


class WeightReader(Protocol):
    """Gives a tensor by its name in the checkpoint."""

    def __call__(self, name: str) -> Tensor:
        """The tensor, in the dtype and on the device that the rank works with."""
        ...


class SafetensorsReader:
    """Reads from safetensors files, opened once each; `names_read` records what was asked for."""

    def __init__(self, index: CheckpointIndex, dtype: torch.dtype, device: torch.device) -> None:
        self._index = index
        self._dtype = dtype
        self._device = device
        self._open: dict[Path, safe_open] = {}
        self.names_read: list[str] = []

    def __call__(self, name: str) -> Tensor:
        """One tensor; CheckpointError names the file when it cannot be read."""
        path = self._index.files[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            tensor: Tensor = self._open[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read at {name}: {error}") from error
        self.names_read.append(name)
        return tensor.to(device=self._device, dtype=self._dtype)


class DummyReader:
    """Random weights, the same for the same name and seed on any rank; norms are ones.

    Scaled by 1 / sqrt(fan-in), so that activations stay of order one through any depth.
    """

    def __init__(
        self, config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shapes = dict(config.all_tensors())
        self._seed = seed
        self._dtype = dtype
        self._device = device

    def __call__(self, name: str) -> Tensor:
        """One tensor."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(
            zlib.crc32(name.encode()) + self._seed
        )
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        bound = math.sqrt(3.0 / shape[-1])
        return tensor.uniform_(-bound, bound, generator=generator)
