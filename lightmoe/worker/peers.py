"""A rank's end of the copy_engine transport: how large it is, and how ranks open it together."""

from __future__ import annotations

import torch

from lightmoe.distributed.communicator import Communicator
from lightmoe.distributed.peers import PeerMemory, Road
from lightmoe.models.config import ModelConfig
from lightmoe.moe.dispatch.arena import ArenaLayout
from lightmoe.moe.dispatch.peer_lane import PeerLane
from lightmoe.moe.dispatch.summing import SummingLane
from lightmoe.worker.config import WorkerConfig
from lightmoe.worker.graphs import MAX_BATCH


def arena_layout(
    model: ModelConfig,
    num_ranks: int,
    max_tokens: int,
    element_bytes: int,
    *,
    as_int8: bool,
) -> ArenaLayout:
    """The arenas of ranks that run up to `max_tokens` each in a step."""
    return ArenaLayout(
        num_ranks=num_ranks,
        max_tokens=max(max_tokens, MAX_BATCH),  # what a padded decode step takes
        num_experts=model.num_experts,
        num_experts_per_token=model.num_experts_per_tok,
        width=model.hidden_size,
        element_bytes=element_bytes,
        summed=as_int8,  # a code has one scale, so results of a token are added up before
        as_int8=as_int8,
    )


def exchange_bytes(
    model: ModelConfig,
    num_ranks: int,
    max_tokens: int,
    element_bytes: int,
    *,
    as_int8: bool,
) -> int:
    """What the transport takes of a rank's card, the products' intermediate rows included.

    Every rank has room for all pairs of a step: how many it gets, only its device knows.
    """
    total = 0
    for tokens in (max_tokens, half_tokens(max_tokens)):
        layout = arena_layout(
            model,
            num_ranks,
            tokens,
            element_bytes,
            as_int8=as_int8,
        )
        inner_bytes = layout.max_pairs * model.moe_intermediate_size * element_bytes
        total += layout.num_bytes + layout.device_bytes + inner_bytes
    return total


def open_lanes(
    config: WorkerConfig,
    control: Communicator,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[PeerLane, PeerLane]:
    """Open every rank's arenas, one for whole steps and the first of two halves, one for the other.

    All ranks call this at once.
    """
    whole = _open(config, control, device, dtype, config.max_num_batched_tokens)
    half = half_tokens(config.max_num_batched_tokens)
    return whole, _open(config, control, device, dtype, half, whole)


def half_tokens(max_tokens: int) -> int:
    """Tokens of the larger half of a step."""
    return -(-max_tokens // 2)


def _open(
    config: WorkerConfig,
    control: Communicator,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
    like: PeerLane | None = None,
) -> PeerLane:
    layout = arena_layout(
        config.model,
        control.num_ranks,
        max_tokens,
        dtype.itemsize,
        as_int8=config.payload == "int8",
    )
    road: Road = "host" if config.peers_on_host else "ipc"
    memory = PeerMemory(control, device, layout.num_bytes, road)
    kind = SummingLane if layout.summed else PeerLane
    lane = kind(
        layout,
        memory,
        control.rank,
        len(config.model.moe_layers),
        dtype,
        device,
        config.timeout_seconds,
        like=like,
    )
    if config.trace is not None:
        lane.count_sent()
    return lane
