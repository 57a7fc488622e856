"""Experts spread over CPU ranks, by gloo."""

from __future__ import annotations

from lightmoe.distributed.communicator import Communicator
from lightmoe.moe.dispatch.base import ExpertGroup
from lightmoe.moe.dispatch.collective import CollectiveDispatcher
from lightmoe.moe.dispatch.host_receipt import HostReceiptWriter


class GlooDispatcher(CollectiveDispatcher):
    """The transport of many ranks without GPUs."""

    def __init__(self, group: ExpertGroup, layer: int, communicator: Communicator) -> None:
        super().__init__(group, layer, communicator, HostReceiptWriter(group, layer))
