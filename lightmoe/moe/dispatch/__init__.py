"""The seam between a MoE layer and the ranks that hold its experts.

`local` serves one rank, `gloo` many on CPUs. A transport is a Dispatcher; nothing above it knows
which one it has.
"""

from lightmoe.moe.dispatch.base import Dispatcher, ExpertGroup, Receipt
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


def make_dispatcher(group: ExpertGroup, layer: int) -> Dispatcher:
    """The dispatcher of one layer: `local` without a communicator, else `gloo`."""
    if group.communicator is None:
        return LocalDispatcher(group, layer)
    return GlooDispatcher(group, layer, group.communicator)
