"""What a rank is told at its start. No torch here: the driver makes it before any rank runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightmoe.models.config import ModelConfig
from lightmoe.moe.placement import Placement

BLOCK_SIZE = 16
"""Positions in one KV block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """All that a rank is told at its start. `num_kv_blocks` blocks hold 16 positions each."""

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
    deterministic: bool = True
    timeout_seconds: float = 60.0
