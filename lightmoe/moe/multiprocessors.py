"""What the exchange and the experts have of a card's multiprocessors, beside each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightmoe.distributed.peers import Road
from lightmoe.kernels.library import library
from lightmoe.moe.overlap_model import UP_SHARE, Overlap

EXCHANGE_SHARE = 2 / 11
"""Of the multiprocessors, for an exchange that runs beside the experts: 24 of an H200's 132."""

HOST_CTAS = 4
"""For an exchange through the host, whose rate is the bus's and not the card's: so many pull
43 GB/s of the 46 that all of an H100's multiprocessors do, and add up 46 of 47. They are kept free:
waiting until a product gives one up costs more."""

HOST_UP_SHARE = 2 / 3
"""UP_SHARE where nobody waits for results on their way to the host: by arithmetic alone."""


@dataclass(frozen=True, slots=True)
class Multiprocessors:
    """Those of an exchange, and of the experts beside it: of these, for a first product `up_share`
    where a second one of as many tokens runs beside it."""

    exchange: int
    experts: int
    up_share: float = UP_SHARE

    @classmethod
    def of(cls, count: int, road: Road, *, claims_tiles: bool) -> Multiprocessors:
        """Of a card that has so many, whose ranks meet there.

        Over links, products that claim their tiles have all: CTAs that the exchange makes late take
        fewer.
        """
        if road == "host":
            return cls(HOST_CTAS, max(1, count - HOST_CTAS), HOST_UP_SHARE)
        exchange = max(1, round(EXCHANGE_SHARE * count))
        return cls(exchange, count if claims_tiles else max(1, count - exchange))


def multiprocessors_of(device: torch.device, road: Road = "ipc") -> Multiprocessors:
    """What the exchange and the experts have of a card beside each other; of no card, one each."""
    if device.type != "cuda":
        return Multiprocessors(1, 1)
    card = torch.cuda.get_device_properties(device)
    claims = library().architecture_of(device) == "90"
    return Multiprocessors.of(card.multi_processor_count, road, claims_tiles=claims)


def overlap_beside(device: torch.device, road: Road = "ipc") -> Overlap:
    """What products have of a device beside an exchange and each other; of a CPU, all."""
    if device.type != "cuda":
        return Overlap()
    shares = multiprocessors_of(device, road)
    return Overlap(expert_ctas=shares.experts, up_share=shares.up_share)
