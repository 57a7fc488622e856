"""What a rank's memory holds: dense weights, slots of experts, KV cache, buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from lightmoe.errors import UsageError
from lightmoe.models.model_config import ModelConfig
from lightmoe.topology import Device, Topology

Quantization = Literal["none", "int8", "int4"]

# What `lightmoe launch` takes of a card and of a machine's memory.
_USABLE_SHARE = {"cuda": 0.9, "cpu": 0.8}
_STEP_TOKENS = {"cuda": 4096, "cpu": 512}
_BITS = {"int8": 8, "int4": 4}
_SCALE_BYTES_PER_ELEMENT = 2 / 128  # a 16-bit scale for 128 weights
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be served: `batch` sequences at once in all, with prompts of so many tokens.

    `spares` of the ranks hold replicas only.
    """

    model: ModelConfig
    model_name: str
    topology: Topology
    quantization: Quantization = "none"
    batch: int = 64
    prompt: int = 1024
    spares: int = 0

    def __post_init__(self) -> None:
        for name, most in (("batch", 2**16), ("prompt", 2**20)):
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"{name} is {getattr(self, name)}; give 1 to {most}")
        if not 0 <= self.spares < self.topology.num_ranks:
            raise UsageError(
                f"spares ({self.spares}) leaves no home rank of {self.topology.num_ranks} ranks;"
                f" give at most {self.topology.num_ranks - 1}"
            )

    @property
    def num_ranks(self) -> int:
        """Ranks of the topology."""
        return self.topology.num_ranks

    @property
    def slowest(self) -> Device:
        """The device with the least memory bandwidth: the others wait for it.

        CPU ranks share the cores: each has its part of one.
        """
        devices = (self.topology.device(rank) for rank in range(self.num_ranks))
        device = min(devices, key=lambda device: device.reached_bytes_per_second)
        part = min(1.0, self.topology.num_cores / self.num_ranks) if device.kind == "cpu" else 1.0
        return replace(
            device,
            flops_per_second=device.flops_per_second * part,
            bytes_per_second=device.bytes_per_second * part,
        )

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation or a dense weight: 16 bits on cards, float32 on CPUs."""
        return 2 if self.slowest.kind == "cuda" else _FLOAT32_BYTES

    @property
    def expert_element_bytes(self) -> float:
        """Bytes of an expert's weight, scales included."""
        if self.quantization == "none":
            return self.element_bytes
        return _BITS[self.quantization] / 8 + _SCALE_BYTES_PER_ELEMENT

    @property
    def expert_bytes(self) -> int:
        """Size of a slot."""
        return math.ceil(self.model.expert_elements * self.expert_element_bytes)

    @property
    def dense_bytes(self) -> int:
        """Everything that is no expert."""
        return self.model.dense_elements * self.element_bytes

    @property
    def num_expert_copies(self) -> int:
        """Experts of all layers, each once."""
        return len(self.model.moe_layers) * self.model.num_experts

    @property
    def step_tokens(self) -> int:
        """Most tokens of one rank in one step."""
        return min(_STEP_TOKENS[self.slowest.kind], self.prompt * self.sequences_per_rank)

    @property
    def sequences_per_rank(self) -> int:
        """Sequences of the fullest rank."""
        return -(-self.batch // self.num_ranks)

    def cache_bytes(self, num_sequences: int) -> int:
        """KV cache of so many sequences of a prompt and as much again, at most the context."""
        positions = min(2 * self.prompt, self.model.max_position_embeddings)
        return (
            num_sequences * positions * self.model.cache_elements_per_position * self.element_bytes
        )

    @property
    def buffer_bytes(self) -> int:
        """Two sets of rows sent and received, what is between the experts' products, the logits.

        2 sets x 2 directions x T K D, T K 3 F, and float32 logits of every sequence.
        """
        pairs = self.step_tokens * self.model.num_experts_per_tok
        exchanged = 4 * pairs * self.model.hidden_size * self.element_bytes
        between = 3 * pairs * self.model.moe_intermediate_size * self.element_bytes
        logits = self.sequences_per_rank * self.model.vocab_size * _FLOAT32_BYTES
        return exchanged + between + logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """One rank under expert parallelism, in bytes: `num_slots` fit, `num_homes` are needed."""

    rank: int
    device_bytes: int
    usable_bytes: int
    dense_bytes: int
    cache_bytes: int
    buffer_bytes: int
    slot_bytes: int
    num_slots: int
    num_homes: int

    @property
    def fits(self) -> bool:
        """Whether the homes fit beside the rest."""
        return self.num_slots >= self.num_homes

    @property
    def missing_bytes(self) -> int:
        """What lacks for the homes."""
        return max(0, self.num_homes - self.num_slots) * self.slot_bytes


def memory_map(wish: Wish) -> list[Memory]:
    """Every rank's memory: homes alike on all ranks but the spares, then as many replicas as fit.

    num_slots = (usable - dense - cache - buffers) / slot, at most one slot for each expert.
    """
    num_home_ranks = wish.num_ranks - wish.spares
    each, rest = divmod(wish.num_expert_copies, num_home_ranks)
    result = []
    for rank in range(wish.num_ranks):
        device = wish.topology.device(rank)
        usable = int(device.memory_bytes * _USABLE_SHARE[device.kind])
        cache = wish.cache_bytes(wish.sequences_per_rank)
        left = usable - wish.dense_bytes - cache - wish.buffer_bytes
        result.append(
            Memory(
                rank=rank,
                device_bytes=device.memory_bytes,
                usable_bytes=usable,
                dense_bytes=wish.dense_bytes,
                cache_bytes=cache,
                buffer_bytes=wish.buffer_bytes,
                slot_bytes=wish.expert_bytes,
                num_slots=min(max(0, left // wish.expert_bytes), wish.num_expert_copies),
                num_homes=each + (rank < rest) if rank < num_home_ranks else 0,
            )
        )
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTier:
    """Slots of each rank, experts of the fullest, and what all keep in the host's memory."""

    num_slots: int
    num_homes: int
    host_bytes: int


def host_tier(wish: Wish) -> HostTier | None:
    """What a launch on cards does where experts do not fit: they take turns in the slots that do.

    All ranks are homes then. None where it is not needed, or where slots would not suffice for the
    experts of one layer.
    """
    ranks = memory_map(replace(wish, spares=0))
    num_slots = min(entry.num_slots for entry in ranks)
    of_one_layer = -(-wish.model.num_experts // wish.num_ranks)
    if wish.slowest.kind == "cpu" or num_slots < of_one_layer or all(one.fits for one in ranks):
        return None
    return HostTier(
        num_slots=num_slots,
        num_homes=max(entry.num_homes for entry in ranks),
        host_bytes=wish.num_expert_copies * wish.expert_bytes,
    )


def usable_bytes(wish: Wish) -> int:
    """What the smallest rank may use."""
    devices = (wish.topology.device(rank) for rank in range(wish.num_ranks))
    return min(int(device.memory_bytes * _USABLE_SHARE[device.kind]) for device in devices)
