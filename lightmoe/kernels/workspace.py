"""Memory that the gate's kernels keep between launches: counters, counts, sums of parts.

Every launch leaves it ready for the next, so it is zeroed once. Launches that may run at the same
time need one each: here each stream has its own. Graphs captured on one stream share that stream's,
so they run one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe.kernels.streams import raw_stream

BYTES = 9 << 20
"""Enough for 512 experts and the router product of 64 tokens of width 16384."""


def workspace_of(device: torch.device) -> Tensor:
    """The workspace uint8 [BYTES] of the current stream of a CUDA device.

    The first time on a stream should not be inside a graph's capture: the graph would then zero its
    memory in every replay, which costs a launch.
    """
    key = (device.index, raw_stream(device))
    found = _workspaces.get(key)
    if found is not None:
        return found
    workspace = torch.zeros(BYTES, dtype=torch.uint8, device=device)
    if not torch.cuda.is_current_stream_capturing():
        # Never given back: captured graphs hold its address.
        _workspaces[key] = workspace
    return workspace


_workspaces: dict[tuple[int, int], Tensor] = {}
