"""What the exchange and the experts have of a card's multiprocessors, beside each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightmoe.kernels.library import library

EXCHANGE_SHARE = 2 / 11
"""Of the multiprocessors, for an exchange that runs beside the experts: 24 of an H200's 132."""


@dataclass(frozen=True, slots=True)
class Multiprocessors:
    """Those of an exchange, and those of the experts beside it."""

    exchange: int
    experts: int

    @classmethod
    def of(cls, count: int, *, claims_tiles: bool) -> Multiprocessors:
        """Of a card that has so many.

        Products that claim their tiles have all: CTAs that the exchange makes late take fewer.
        """
        exchange = max(1, round(EXCHANGE_SHARE * count))
        return cls(exchange, count if claims_tiles else max(1, count - exchange))


def multiprocessors_of(device: torch.device) -> Multiprocessors:
    """What the exchange and the experts have of a card beside each other; of no card, one each."""
    if device.type != "cuda":
        return Multiprocessors(1, 1)
    card = torch.cuda.get_device_properties(device)
    claims = library().architecture_of(device) == "90"
    return Multiprocessors.of(card.multi_processor_count, claims_tiles=claims)
