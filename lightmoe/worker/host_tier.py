"""A rank's experts in the host's memory, and slots for as many as it was told to have at once."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from lightmoe.errors import MachineError
from lightmoe.models.config import ModelConfig
from lightmoe.models.decoder import read_expert
from lightmoe.models.weights import WeightReader
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.moe.experts import SlotPool
from lightmoe.moe.residency import Residency
from lightmoe.quant.packing import ExpertLayout
from lightmoe.worker.config import WorkerConfig


def open_host_tier(
    config: WorkerConfig,
    read: WeightReader,
    group: ExpertGroup,
    dtype: torch.dtype,
    device: torch.device,
) -> SlotPool:
    """Read this rank's experts into the host's memory, one by one over a slot's room on `device`.

    Returns the slots, still empty, and has `group` fill them as layers need it. MachineError where
    the host's memory does not suffice.
    """
    assert config.expert_slots is not None, "without a number every expert has a slot"
    layout = ExpertLayout(config.model.hidden_size, config.model.moe_intermediate_size)
    host = _read_experts(config.model, read, group, layout, dtype, device)
    pool = SlotPool(min(config.expert_slots, len(host)), layout, dtype, device)
    rows = group.placement.slot_table[:, :, group.rank]
    group.residency = Residency(pool.blobs, host, rows, group.tables_on(device))
    return pool


def _read_experts(
    model: ModelConfig,
    read: WeightReader,
    group: ExpertGroup,
    layout: ExpertLayout,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """This rank's experts [H, elements] in the host's memory, by the code that would fill slots."""
    experts = list(group.placement.hosted(group.rank))
    host = _host_memory(len(experts), layout.num_elements, dtype, device)
    scratch = torch.empty(layout.num_elements, dtype=dtype, device=device)
    for layer, expert, row in experts:
        read_expert(model, read, layer, expert, scratch)
        host[row].copy_(scratch)
    return host


def _host_memory(
    num_rows: int, num_elements: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory [rows, elements] that the device's copy engines read as it is, until it is dropped."""
    size = num_rows * num_elements * dtype.itemsize
    try:
        memory = torch.empty(num_rows, num_elements, dtype=dtype)
        if device.type == "cuda" and size:
            _pin(memory, size, device)
    except RuntimeError as error:
        raise MachineError(
            f"the host has no {size / 2**30:.1f} GiB for {num_rows} experts of one rank ({error});"
            " use more memory (ulimit -l), a smaller model, or more slots (--expert-slots)"
        ) from error
    return memory


def _pin(memory: Tensor, size: int, device: torch.device) -> None:
    """Not pin_memory=True, which takes the next power of two."""
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
