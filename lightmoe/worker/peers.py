"""A rank's end of the copy_engine transport: how large it is, and how ranks open it together."""

from __future__ import annotations

import torch

from lightmoe.distributed.communicator import Communicator
from lightmoe.distributed.peers import PeerMemory, Road
from lightmoe.models.config import ModelConfig
from lightmoe.moe.dispatch.copy_engine import ArenaLayout, PeerLane
from lightmoe.worker.config import WorkerConfig


def arena_layout(
    model: ModelConfig, num_ranks: int, max_tokens: int, element_bytes: int
) -> ArenaLayout:
    """The arenas of ranks that run up to `max_tokens` each in a step."""
    return ArenaLayout(
        num_ranks=num_ranks,
        max_tokens=max_tokens,
        num_experts=model.num_experts,
        num_experts_per_token=model.num_experts_per_tok,
        width=model.hidden_size,
        element_bytes=element_bytes,
    )


def exchange_bytes(model: ModelConfig, num_ranks: int, max_tokens: int, element_bytes: int) -> int:
    """What the transport takes of a rank's card, the products' intermediate rows included.

    Every rank has room for all pairs of a step: how many it gets, only its device knows.
    """
    layout = arena_layout(model, num_ranks, max_tokens, element_bytes)
    inner_bytes = layout.max_pairs * model.moe_intermediate_size * element_bytes
    return layout.num_bytes + layout.device_bytes + inner_bytes


def open_lane(
    config: WorkerConfig,
    control: Communicator,
    device: torch.device,
    dtype: torch.dtype,
) -> PeerLane:
    """Open every rank's arena; all ranks call this at once."""
    layout = arena_layout(
        config.model, control.num_ranks, config.max_num_batched_tokens, dtype.itemsize
    )
    road: Road = "host" if config.peers_on_host else "ipc"
    memory = PeerMemory(control, device, layout.num_bytes, road)
    num_layers = len(config.model.moe_layers)
    return PeerLane(layout, memory, control.rank, num_layers, dtype, device, config.timeout_seconds)
