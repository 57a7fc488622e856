"""The seam between a MoE layer and the ranks that hold its experts.

`local` serves one rank, `gloo` many on CPUs. A transport is a Dispatcher; nothing above it knows
which one it has.
"""

import torch

from lightmoe.moe.dispatch.base import Dispatcher, ExpertGroup, Receipt, TokensPerTile
from lightmoe.moe.dispatch.gloo import GlooDispatcher
from lightmoe.moe.dispatch.local import LocalDispatcher

__all__ = [
    "Dispatcher",
    "ExpertGroup",
    "GlooDispatcher",
    "LocalDispatcher",
    "Receipt",
    "make_dispatcher",
]


def make_dispatcher(
    group: ExpertGroup, layer: int, device: torch.device, tokens_per_tile: TokensPerTile
) -> Dispatcher:
    """The dispatcher of one layer: `local` without a communicator, else `gloo`."""
    if group.communicator is None:
        return LocalDispatcher(group, layer, device, tokens_per_tile)
    return GlooDispatcher(group, layer, group.communicator)
