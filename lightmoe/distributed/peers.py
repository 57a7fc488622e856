"""Memory of every rank that all ranks' kernels address: CUDA IPC between cards that reach each
other, else pinned memory of the host that all of them have mapped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightmoe.distributed.communicator import Communicator
from lightmoe.errors import MachineError

Road = Literal["ipc", "host"]
"""Where arenas lie: on their rank's card, or in the host's memory."""

_SHARED_FOLDER = Path("/dev/shm")
_NAME_BYTES = 32


class PeerMemory:
    """One arena of `num_bytes` a rank. `addresses[rank]` is where this rank's device finds it.

    Every rank calls this with the same size and road. Zeros at first. MachineError where the road
    does not work on this machine.
    """

    def __init__(
        self, control: Communicator, device: torch.device, num_bytes: int, road: Road
    ) -> None:
        self.road = road
        self.num_bytes = num_bytes
        self._close = contextlib.ExitStack()
        open_arenas = _open_on_cards if road == "ipc" else _open_on_host
        try:
            with torch.cuda.device(device):
                self.addresses, self.arena = open_arenas(control, num_bytes, self._close)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the memory back. No rank may use it any more."""
        self._close.close()


def gather_bytes(control: Communicator, mine: bytes) -> list[bytes]:
    """The bytes of every rank, as many each, in rank order."""
    num_ranks, size = control.num_ranks, len(mine)
    sent = torch.frombuffer(bytearray(mine), dtype=torch.uint8).view(1, -1).repeat(num_ranks, 1)
    received = torch.empty(num_ranks, size, dtype=torch.uint8)
    control.all_to_all(received, sent, [1] * num_ranks, [1] * num_ranks)
    return [bytes(row.tolist()) for row in received]


def _open_on_cards(
    control: Communicator, num_bytes: int, close: contextlib.ExitStack
) -> tuple[list[int], Tensor]:
    runtime = cuda_runtime()
    address = runtime.malloc(num_bytes)
    close.callback(runtime.free, address)
    runtime.memset(address, 0, num_bytes)
    runtime.deviceSynchronize()
    handles = gather_bytes(control, bytes(runtime.ipcGetMemHandle(address)))
    addresses = []
    for rank, handle in enumerate(handles):
        if rank == control.rank:
            addresses.append(address)
            continue
        peer = open_handle(handle, control.rank, rank)
        close.callback(runtime.ipcCloseMemHandle, peer)
        addresses.append(peer)
    return addresses, _device_bytes(address, num_bytes)


def open_handle(handle: bytes, rank: int, owner: int) -> int:
    """Where another rank's allocation is on this rank's card."""
    runtime = cuda_runtime()
    try:
        return int(runtime.ipcOpenMemHandle(handle))
    except runtime.CUDARuntimeError as error:
        raise MachineError(
            f"rank {rank} cannot reach the memory of rank {owner} ({error}); use --transport nccl"
        ) from error


def _open_on_host(
    control: Communicator, num_bytes: int, close: contextlib.ExitStack
) -> tuple[list[int], Tensor]:
    runtime = cuda_runtime()
    path = _SHARED_FOLDER / f"lightmoe-{secrets.token_hex(8)}"
    close.callback(path.unlink, missing_ok=True)
    mine = _map_file(path, num_bytes, os.O_CREAT | os.O_EXCL | os.O_RDWR, close)
    names = gather_bytes(control, path.name.encode().ljust(_NAME_BYTES))
    addresses = []
    for rank, name in enumerate(names):
        there = _SHARED_FOLDER / name.decode().strip()
        memory = mine if rank == control.rank else _map_file(there, num_bytes, os.O_RDWR, close)
        start = memory.data_ptr()
        runtime.hostRegister(start, num_bytes, _MAPPED_PORTABLE)
        close.callback(runtime.hostUnregister, start)
        addresses.append(_device_pointer(start))
    gather_bytes(control, b"\0")  # all have opened it
    path.unlink()
    return addresses, mine


_MAPPED_PORTABLE = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


def _map_file(path: Path, num_bytes: int, flags: int, close: contextlib.ExitStack) -> Tensor:
    """The file's bytes as a tensor; only this user may open it."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    try:
        if flags & os.O_CREAT:
            os.posix_fallocate(descriptor, 0, num_bytes)
        mapped = mmap.mmap(descriptor, num_bytes)
    except OSError as error:
        raise MachineError(
            f"{num_bytes / 2**20:.0f} MiB of shared memory are not to be had in {path.parent}"
            f" ({error.strerror}); make it larger, or use --transport nccl"
        ) from error
    finally:
        os.close(descriptor)
    close.callback(_drop, mapped)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def _drop(mapped: mmap.mmap) -> None:
    """Unmap, unless tensors still see the memory: then it goes with the last of them."""
    with contextlib.suppress(BufferError):
        mapped.close()


def _device_pointer(host_address: int) -> int:
    """With unified addressing, which every 64-bit Linux has, pinned memory has one address."""
    return host_address


def cuda_runtime() -> Any:
    """cupy's CUDA runtime, or MachineError saying how to get it."""
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise MachineError(
            "the exchange between GPUs needs cupy; install it: make install GPU=cuda12 or cuda13"
        ) from error
    return runtime


def _device_bytes(address: int, num_bytes: int) -> Tensor:
    """The memory of the current device as a tensor; whoever owns it frees it."""

    class Memory:
        __cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    memory: Tensor = torch.as_tensor(Memory(), device="cuda")
    return memory
