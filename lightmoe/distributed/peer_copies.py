"""Copies from other ranks' cards by the copy engines: no kernel runs and no byte passes the host.

The owner takes no part. Whoever copies must know that what lies there is complete, and stays.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lightmoe.distributed.communicator import Communicator
from lightmoe.distributed.peers import cuda_runtime, gather_bytes, open_handle
from lightmoe.errors import MachineError

_ANY_WAY = 4  # cudaMemcpyDefault: the addresses say which way
_TOUCHED_BYTES = 16
_OFFSET = struct.Struct("<Q")


class Copying:
    """Copies under way."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def done(self) -> bool:
        """Whether the last byte has come."""
        return bool(self._event.query())

    def result(self) -> None:
        """Wait for it."""
        self._event.synchronize()


class PeerCopies:
    """The `memory` of every rank, of any size each, opened on this rank's card.

    All ranks make theirs at once, of memory that torch allocated and that lives as long as they
    do. MachineError where a card cannot reach another one's.
    """

    def __init__(self, control: Communicator, memory: Tensor) -> None:
        self._runtime = cuda_runtime()
        with torch.cuda.device(memory.device):
            self._addresses = self._open(control, memory.data_ptr())
            self._stream = torch.cuda.Stream(memory.device)
            # The first copy from a card may have to set much up: not beside a step.
            touched = torch.empty(_TOUCHED_BYTES, dtype=torch.uint8, device=memory.device)
            others = [rank for rank in range(control.num_ranks) if rank != control.rank]
            self.start([(rank, 0, touched) for rank in others]).result()

    def _open(self, control: Communicator, mine: int) -> list[int]:
        """Where each rank's memory is here. CUDA shares whole allocations, torch gives parts."""
        allocation = _allocation_of(mine)
        try:
            handle = bytes(self._runtime.ipcGetMemHandle(allocation))
        except self._runtime.CUDARuntimeError as error:
            raise MachineError(
                f"rank {control.rank} cannot share its experts' memory ({error}); unset"
                " expandable_segments in PYTORCH_CUDA_ALLOC_CONF, or use --free-slots 0"
            ) from error
        addresses = []
        shared = gather_bytes(control, handle + _OFFSET.pack(mine - allocation))
        for rank, theirs in enumerate(shared):
            if rank == control.rank:
                addresses.append(mine)
                continue
            (offset,) = _OFFSET.unpack(theirs[len(handle) :])
            addresses.append(open_handle(theirs[: len(handle)], control.rank, rank) + offset)
        return addresses

    def start(self, copies: Sequence[tuple[int, int, Tensor]]) -> Copying:
        """Begin, after what is on the current stream: each a rank, the first byte of its memory,
        and the bytes here, uint8 [N], that N from there on go to.
        """
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        for rank, begin, target in copies:
            self._runtime.memcpyAsync(
                target.data_ptr(),
                self._addresses[rank] + begin,
                target.numel(),
                _ANY_WAY,
                stream.cuda_stream,
            )
        event = torch.cuda.Event()
        event.record(stream)
        return Copying(event)


def _allocation_of(address: int) -> int:
    """Where the allocation of CUDA's begins that has this address of torch's."""
    for segment in torch.cuda.memory_snapshot():
        begin = int(segment["address"])
        if begin <= address < begin + int(segment["total_size"]):
            return begin
    raise MachineError(
        f"torch knows no allocation at {address:#x}, so no other card can read there;"
        " use --host-copy on"
    )
