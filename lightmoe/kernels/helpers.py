"""Second launches of products that run beside each other, each with a part of the multiprocessors:
whichever ends first, those that it had help the other to the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe.kernels.library import library
from lightmoe.kernels.products import shared_tickets


class Helper:
    """Helps the one product that it is given to, enqueued on `stream`, on `max_ctas` thread blocks.

    Whoever claims a tile, its bits are the same. Keep it until the streams have joined, and all
    that the product was given: both launches use that, and what the product made for itself.
    """

    __slots__ = ("_arguments", "_device", "_kept", "_ready", "_stream", "max_ctas", "ticket")

    def __init__(self, max_ctas: int | None, ticket: Tensor, stream: torch.cuda.Stream) -> None:
        self.max_ctas = max_ctas
        self.ticket = ticket  # int32 [1] on the device: zero, and no other product's meanwhile
        self._stream = stream
        self._arguments: dict[str, object] | None = None

    def prepare(
        self, stem: str, device: torch.device, arguments: dict[str, object], *kept: Tensor
    ) -> None:
        """What the product is launched with, right before it is; `kept` stays as long as this."""
        shares = {"max_ctas": self.max_ctas, "other_ctas": arguments["max_ctas"], "helps": True}
        self._arguments = arguments | shares | {"stem": stem, "device": device}
        self._kept = kept
        self._ready = torch.cuda.Event()
        self._ready.record(self._stream)

    def launch(self, stream: torch.cuda.Stream) -> None:
        """Compute what is left of the tiles, on `stream`, which is the current one.

        It waits for what the product waits for, not for the product. Nothing happens where that one
        had no bound, no pairs, or its thread blocks do not claim their tiles.
        """
        if self._arguments is None:
            return
        self._ready.wait(stream)
        library().launch(**self._arguments)  # type: ignore[arg-type]


class Helpers:
    """Up to `most` helpers, all of which end before the current stream goes on to others."""

    def __init__(self, device: torch.device, most: int) -> None:
        self._tickets = shared_tickets(most, device)
        self._made: list[Helper] = []

    def of(self, max_ctas: int | None, stream: torch.cuda.Stream) -> Helper:
        """One for a product on `stream`; kept as long as these."""
        ticket = self._tickets[len(self._made) :][:1]
        assert len(ticket), "more helpers than there are tickets"
        self._made.append(Helper(max_ctas, ticket, stream))
        return self._made[-1]
