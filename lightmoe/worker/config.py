"""What a rank is told at its start. No torch here: the driver makes it before any rank runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightmoe.core import OverflowRule
from lightmoe.models.config import ModelConfig
from lightmoe.moe.placement import Placement
from lightmoe.telemetry.rank_recorder import TraceConfig

Payload = Literal["full", "int8"]

BLOCK_SIZE = 16
"""Positions in one KV block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """All that a rank is told at its start. `num_kv_blocks` blocks hold 16 positions each.

    With transport copy_engine ranks meet on their cards, or in the host's memory, and rows travel
    as they are or as int8.
    `cards` is the GPU of each rank, empty where a rank takes the first that it sees.
    `num_free_slots` come on top of those that the placement needs; `max_recorded_tokens` is how
    many tokens of a step have their routing recorded (0: it is not). `routing_skew` is the exponent
    of a choice of experts that is made up; None: the gate's own. `overflow` is for transports that
    wait for the host. With `expert_slots` experts take turns in so many slots of a rank, and the
    placement's slots are rows of its copy in the host's memory. `nearness` is the topology's; empty
    where no rank is nearer to another than the rest.
    """

    model: ModelConfig
    folder: Path
    load_format: Literal["auto", "dummy"]
    placement: Placement
    route: str
    device: str
    dtype: str
    max_model_len: int
    num_kv_blocks: int
    num_threads: int
    seed: int
    transport: str = "gloo"
    peers_on_host: bool = False
    payload: Payload = "full"
    overlap: Literal["auto", "off", "halves"] = "auto"
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 16
    cards: tuple[int, ...] = ()
    deterministic: bool = True
    num_free_slots: int = 0
    expert_slots: int | None = None
    host_copy: bool = False
    max_recorded_tokens: int = 0
    timeout_seconds: float = 60.0
    routing_skew: float | None = None
    overflow: OverflowRule | None = None
    trace: TraceConfig | None = None
    nearness: tuple[tuple[int, ...], ...] = ()

    def device_of(self, rank: int) -> str:
        """What torch calls that rank's device."""
        return f"{self.device}:{self.cards[rank]}" if self.cards else self.device

    @property
    def oversubscribed(self) -> bool:
        """Whether ranks share a card."""
        return len(set(self.cards)) < len(self.cards)
