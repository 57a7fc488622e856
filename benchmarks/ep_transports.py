"""What benches of several transports share: settings, machine, the groups of torch and NCCL."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
import torch.distributed as dist
from ep_ranks import SHAPES, RankLayer, Shape

from lightmoe.config import find_data_file
from lightmoe.distributed.communicator import Communicator
from lightmoe.distributed.loopback import measure_cpu
from lightmoe.distributed.nccl import NcclCommunicator, nccl_environment
from lightmoe.distributed.peers import Road
from lightmoe.machine import free_ram_bytes
from lightmoe.moe.dispatch import make_dispatcher
from lightmoe.topology import Topology, read_topology
from lightmoe.topology.cpu import describe_cpu

ALL_SHAPES = SHAPES | {"tiny": Shape(8, 2, 64, 32)}
ROADS: dict[str, Road] = {"nvlink": "ipc", "no-p2p": "host", "cpu": "host"}
_TIMEOUT_SECONDS = 120.0


def machine_of(name: str | None, num_ranks: int) -> Topology:
    """The topology of that name, or this machine measured: some 20 s with cards, 3 s without."""
    if name is not None:
        return read_topology(find_data_file("topology", name)).first(num_ranks)
    if torch.cuda.device_count():
        from lightmoe.topology.nvidia import NvidiaHardware
        from lightmoe.topology.probe import probe

        with NvidiaHardware() as hardware:
            return probe(hardware, "measured", print).first(num_ranks)
    return describe_cpu(measure_cpu(num_ranks, free_ram_bytes() or 0), "measured", num_ranks)


def in_setting(topology: Topology, setting: str) -> Topology:
    """The machine as the setting has it: without peer-to-peer all goes through the host."""
    return replace(topology, fabrics=(), p2p_groups=()) if setting == "no-p2p" else topology


def join_torch_group(communicator: Communicator, device: torch.device) -> None:
    """Torch's own group of these ranks, for what is naive; once a process."""
    if dist.is_initialized():
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.PrefixStore("naive", communicator.connect_store(_TIMEOUT_SECONDS))
    on_card = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_card else "gloo",
        store=store,
        rank=communicator.rank,
        world_size=communicator.num_ranks,
        device_id=device if on_card else None,
    )


def join_nccl(communicator: Communicator, device: torch.device) -> NcclCommunicator | None:
    """This rank's end of our NCCL group; None without cards."""
    if device.type != "cuda":
        return None
    shared = communicator.num_ranks > torch.cuda.device_count()
    os.environ.update(nccl_environment(communicator.rank, oversubscribed=shared))
    return NcclCommunicator(
        communicator.rank, communicator.num_ranks, communicator, device, _TIMEOUT_SECONDS
    )


def over(own: RankLayer, transport: str, nccl: NcclCommunicator | None = None) -> None:
    """Have this rank's layer go by another transport: "local", "nccl", or what its group had."""
    if transport == "nccl":
        own.group = replace(own.group, peers=None, nccl=nccl)
    elif transport == "local":
        own.group = replace(own.group, peers=None, communicator=None)
    else:
        own.group = replace(own.group, peers=own.lane, nccl=None, communicator=own.communicator)
    tile = own.experts.tokens_per_tile
    own.dispatcher = make_dispatcher(own.group, 0, own.device, tile)
