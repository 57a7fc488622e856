"""Random placements, choices and layers, drawn from one seed each so that a failure repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightmoe.distributed.communicator import Communicator
from lightmoe.moe.dispatch import ExpertGroup, make_dispatcher
from lightmoe.moe.dispatch.peer_lane import PeerLane
from lightmoe.moe.experts import Experts, SlotPool
from lightmoe.moe.gate import Gate
from lightmoe.moe.layer import MoELayer
from lightmoe.moe.load import LoadCounter
from lightmoe.moe.overlap_model import Overlap
from lightmoe.moe.placement import Placement
from lightmoe.quant.packing import ExpertLayout


def random_copies(
    generator: np.random.Generator, num_experts: int, num_ranks: int, num_replicas: int
) -> list[list[int]]:
    """copies[expert]: a random home and up to `num_replicas` replicas in all, anywhere."""
    copies = [[int(generator.integers(num_ranks))] for _ in range(num_experts)]
    for _ in range(num_replicas):
        expert, rank = int(generator.integers(num_experts)), int(generator.integers(num_ranks))
        if rank not in copies[expert]:
            copies[expert].append(rank)
    return [[ranks[0], *sorted(ranks[1:])] for ranks in copies]


def random_nearness(generator: np.random.Generator, num_ranks: int) -> list[list[int]]:
    """One to three levels of groups, each within those of the next, of ranks anywhere."""
    groups = generator.integers(num_ranks, size=num_ranks)
    levels = []
    for _ in range(generator.integers(1, 4)):
        levels.append(groups.tolist())
        groups = generator.integers(num_ranks, size=num_ranks)[groups]
    return levels


def placement_of(copies_per_layer: Sequence[Sequence[Sequence[int]]], num_ranks: int) -> Placement:
    """A placement with these copies; slots are numbered as they come."""
    num_layers, num_experts = len(copies_per_layer), len(copies_per_layer[0])
    slot_table = np.full((num_layers, num_experts, num_ranks), -1, dtype=np.int32)
    homes = np.zeros((num_layers, num_experts), dtype=np.int32)
    used = [0] * num_ranks
    for layer, copies in enumerate(copies_per_layer):
        for expert, holders in enumerate(copies):
            homes[layer, expert] = holders[0]
            for rank in holders:
                slot_table[layer, expert, rank] = used[rank]
                used[rank] += 1
    return Placement(slot_table, homes, ("home",) * num_ranks)


def zipf_tokens(
    generator: np.random.Generator, num_experts: int, num_tokens: int, skew: float
) -> list[int]:
    """Tokens per expert: popularity falls as 1 / rank ** skew, in random order."""
    share = 1.0 / np.arange(1, num_experts + 1) ** skew
    generator.shuffle(share)
    tokens: list[int] = generator.multinomial(num_tokens, share / share.sum()).tolist()
    return tokens


def zipf_choice(
    generator: np.random.Generator,
    num_tokens: int,
    num_experts: int,
    num_per_token: int,
    skew: float,
) -> np.ndarray:
    """Experts [T, K], distinct for each token, the popular ones likelier (Gumbel top-k)."""
    score = -skew * np.log(np.arange(1, num_experts + 1))
    generator.shuffle(score)
    noisy = score + generator.gumbel(size=(num_tokens, num_experts))
    return np.argsort(-noisy, axis=1)[:, :num_per_token]


@dataclass(frozen=True)
class LayerWeights:
    """One MoE layer: router [E, D], gates and ups [E, F, D], downs [E, D, F]."""

    router: Tensor
    gates: Tensor
    ups: Tensor
    downs: Tensor
    num_per_token: int

    @classmethod
    def random(
        cls, seed: int, num_experts: int, num_per_token: int, width: int, expert_width: int
    ) -> LayerWeights:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

        return cls(
            normal(num_experts, width),
            normal(num_experts, expert_width, width),
            normal(num_experts, expert_width, width),
            normal(num_experts, width, expert_width),
            num_per_token,
        )

    def on_rank(
        self,
        rank: int,
        placement: Placement,
        communicator: Communicator | None,
        *,
        route: str,
        num_chunks: int,
        tokens_per_rank: tuple[int, ...],
        deterministic: bool = True,
    ) -> tuple[MoELayer, ExpertGroup]:
        """The layer as one rank has it: its slots filled, its dispatcher joined."""
        group = ExpertGroup(
            rank=rank,
            placement=placement,
            communicator=communicator,
            route=route,
            layer_pairs=np.zeros(1, dtype=np.int64),
            tokens_per_rank=tokens_per_rank,
            deterministic=deterministic,
        )
        num_experts, expert_width, width = self.gates.shape
        layout, device = ExpertLayout(width, expert_width), torch.device("cpu")
        pool = SlotPool(placement.num_slots(rank), layout, torch.float32, device)
        for _, expert, slot in placement.hosted(rank):
            layout.write(pool.blobs[slot], self.gates[expert], self.ups[expert], self.downs[expert])
        experts = Experts(pool, deterministic=deterministic)
        layer = MoELayer(
            0,
            Gate(self.router, self.num_per_token, renormalize=True),
            LoadCounter(1, num_experts, device),
            make_dispatcher(group, 0, device, experts.tokens_per_tile),
            experts,
            overlap=Overlap(num_chunks=num_chunks),
        )
        return layer, group


def poison_results(lane: PeerLane) -> None:
    """Make whatever ranks gave this one no number, in any format."""
    begin, size = (where["results"] for where in (lane.layout.offsets, lane.layout.sizes))
    lane.memory.arena[begin:][:size].fill_(0xFF)
    lane.own_results.view(torch.uint8).fill_(0xFF)
