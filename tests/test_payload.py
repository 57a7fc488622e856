"""--payload: what it becomes, and where it is refused."""

from __future__ import annotations

import pytest
import torch

from lightmoe.config import LaunchConfig
from lightmoe.errors import UsageError
from lightmoe.machine import Driver, Gpu
from lightmoe.worker import devices
from lightmoe.worker.resolve import resolve

H100 = Gpu(name="H100", compute_capability=(9, 0), memory_bytes=80 << 30, free_bytes=80 << 30)
TOGETHER = Driver(version="580.65.06", gpus=(H100,) * 2, p2p_pairs=((0, 1),))


def config(**values: object) -> LaunchConfig:
    given = {"model": "mixtral-lite", "gpus": 2, "device": "cuda", "deterministic": "off"}
    return LaunchConfig(**given | values)


@pytest.fixture(autouse=True)
def _torch_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "read_cupy", lambda: ("cupy-cuda13x 14.2.0",))


@pytest.mark.parametrize("payload", ["full", "int8"])
def test_what_was_asked_for_travels(payload: str) -> None:
    assert resolve(config(payload=payload), TOGETHER).payload == payload
    assert resolve(config(), TOGETHER).payload == "full"


@pytest.mark.parametrize(
    "values", [{"dtype": "float32"}, {"transport": "nccl"}, {"gpus": 1}], ids=str
)
def test_int8_is_refused_where_nothing_carries_it(values: dict) -> None:
    with pytest.raises(UsageError, match="payload int8 is for 16 bits and transport copy_engine"):
        resolve(config(payload="int8", **values), TOGETHER)


def test_int8_rounds_so_it_is_not_deterministic() -> None:
    with pytest.raises(UsageError, match="give deterministic off as well"):
        config(payload="int8", deterministic="on")
    with pytest.raises(UsageError, match="payload is 'int4'; give one of: full, int8"):
        config(payload="int4")
