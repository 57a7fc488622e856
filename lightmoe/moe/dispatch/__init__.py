"""The seam between a MoE layer and the ranks that hold its experts.

`local` serves one rank, `gloo` many on CPUs, `nccl` and `copy_engine` many on GPUs. A transport is
a Dispatcher; nothing above it knows which one it has.
"""

import torch

from lightmoe.moe.dispatch.base import Dispatcher, ExpertGroup, Receipt, TokensPerTile
from lightmoe.moe.dispatch.copy_engine import CopyEngineDispatcher
from lightmoe.moe.dispatch.gloo import GlooDispatcher
from lightmoe.moe.dispatch.local import LocalDispatcher
from lightmoe.moe.dispatch.nccl import NcclDispatcher

__all__ = [
    "CopyEngineDispatcher",
    "Dispatcher",
    "ExpertGroup",
    "GlooDispatcher",
    "LocalDispatcher",
    "NcclDispatcher",
    "Receipt",
    "make_dispatcher",
]


def make_dispatcher(
    group: ExpertGroup, layer: int, device: torch.device, tokens_per_tile: TokensPerTile
) -> Dispatcher:
    """The dispatcher of one layer: `local` for one rank, else what the group can use."""
    if group.communicator is None:
        return LocalDispatcher(group, layer, device, tokens_per_tile)
    if group.peers is not None:
        return CopyEngineDispatcher(group, layer, group.peers, tokens_per_tile)
    if group.nccl is not None:
        return NcclDispatcher(group, layer, device, tokens_per_tile, group.nccl)
    return GlooDispatcher(group, layer, group.communicator)
