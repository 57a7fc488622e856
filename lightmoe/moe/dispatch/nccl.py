"""Experts spread over GPUs, by NCCL's grouped sends and receives."""

from __future__ import annotations

import torch

from lightmoe.distributed.communicator import Exchanger
from lightmoe.moe.dispatch.base import ExpertGroup, TokensPerTile
from lightmoe.moe.dispatch.collective import CollectiveDispatcher
from lightmoe.moe.dispatch.receipt import ReceiptWriter


class NcclDispatcher(CollectiveDispatcher):
    """The transport of many ranks on GPUs that works on every machine with NCCL.

    It works on the current stream: an exchange begins after what is enqueued there, and what is
    enqueued there later finds its results. Under `stream`, the communicator's, that is beside
    other work.
    """

    def __init__(
        self,
        group: ExpertGroup,
        layer: int,
        device: torch.device,
        tokens_per_tile: TokensPerTile,
        communicator: Exchanger,
    ) -> None:
        writer = ReceiptWriter(group, layer, device, tokens_per_tile)
        super().__init__(group, layer, communicator, writer)
        self.stream = communicator.stream
