"""Random counts and copies for the tests of a route, and what its three versions answer."""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.route import ROUTE_NUMBERS
from lightmoe.kernels.route_reference import RouteSplit
from tests.kernels.drivers import KERNELS
from tests.moe.cases import random_copies, random_nearness, zipf_tokens

_POINTERS = "source_offsets copy_ranks segments group_offsets tile_offsets tile_groups rank_pairs"
_NUMBERS = "source_stride num_ranks num_experts num_copies rank route sweeps tokens_per_tile"


class RouteSplitArgs(ctypes.Structure):
    """light_route_split_args."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in [*_POINTERS.split(), "active_experts", "nearness"]),
        *((name, ctypes.c_int) for name in [*_NUMBERS.split(), "most_tiles", "num_levels"]),
    ]


@dataclass(frozen=True)
class RouteCase:
    """counts [W, E]; copies[expert]; their table [E, C], wider than it has to be now and then."""

    counts: np.ndarray
    copies: list[list[int]]
    copy_ranks: Tensor
    tokens_per_tile: int
    rank: int
    sweeps: int
    nearness: list[list[int]] = field(default_factory=list)

    @classmethod
    def random(cls, seed: int, most_ranks: int, most_experts: int) -> RouteCase:
        """Any sizes, any skew, none to all of the ranks with a copy, few tokens or many."""
        generator = np.random.default_rng(seed)
        num_ranks = int(generator.integers(1, most_ranks + 1))
        num_experts = int(generator.integers(1, most_experts + 1))
        num_replicas = int(generator.integers(2 * num_experts + num_ranks))
        copies = random_copies(generator, num_experts, num_ranks, num_replicas)
        if generator.random() < 0.3:  # replicas in any order
            copies = [
                generator.permutation(num_ranks)[: generator.integers(1, num_ranks + 1)].tolist()
                for _ in range(num_experts)
            ]
        if generator.random() < 0.3:  # few sets of ranks, each by several experts, in any order
            sets = copies[: generator.integers(1, 6)]
            chosen = generator.integers(len(sets), size=num_experts)
            copies = [generator.permutation(sets[one]).tolist() for one in chosen]
        width = min(num_ranks, max(map(len, copies)) + int(generator.integers(2)))
        most_tokens = int(10 ** generator.uniform(0, 5))
        counts = np.array(
            [
                zipf_tokens(generator, num_experts, generator.integers(most_tokens), skew)
                for skew in generator.uniform(0, 2.5, size=num_ranks)
            ]
        )
        if generator.random() < 0.2:
            counts[generator.random(counts.shape) < 0.7] = 0
        return cls(
            counts,
            copies,
            torch.tensor([[*ranks, *[-1] * (width - len(ranks))] for ranks in copies]).int(),
            tokens_per_tile=8 * int(generator.integers(1, 5)),
            rank=int(generator.integers(num_ranks)),
            sweeps=int(generator.integers(6)),
            nearness=random_nearness(generator, num_ranks) if generator.random() < 0.6 else [],
        )

    @property
    def source_offsets(self) -> Tensor:
        """int32 [W, E + 1], rows of a longer table."""
        num_ranks, num_experts = self.counts.shape
        table = torch.zeros(num_ranks, num_experts + 4, dtype=torch.int32)
        table[:, 1 : num_experts + 1] = torch.from_numpy(self.counts.cumsum(axis=1))
        return table[:, : num_experts + 1]

    @property
    def slots(self) -> Tensor:
        """Numbers that nobody looks at."""
        return torch.arange(self.counts.shape[1], dtype=torch.int32)

    @property
    def levels(self) -> Tensor | None:
        """The nearness int32 [N, W]."""
        return torch.tensor(self.nearness, dtype=torch.int32) if self.nearness else None

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """The positional arguments of route_split."""
        num_pairs = int(self.counts.sum())
        return self.source_offsets, self.copy_ranks, self.slots, self.tokens_per_tile, num_pairs


def assert_same_split(found: RouteSplit, wanted: RouteSplit, copy_ranks: Tensor) -> None:
    """All integers of copies [E, C] that exist; of the table of tiles those that were written."""
    exists = copy_ranks >= 0
    assert torch.equal(found.rank_pairs.cpu(), wanted.rank_pairs)
    assert torch.equal(found.segments.cpu()[:, exists], wanted.segments[:, exists])
    assert torch.equal(found.groups.offsets.cpu(), wanted.groups.offsets)
    assert torch.equal(found.groups.tile_offsets.cpu(), wanted.groups.tile_offsets)
    num_tiles = len(wanted.groups.tile_groups)
    assert len(found.groups.tile_groups) >= num_tiles
    assert torch.equal(found.groups.tile_groups[:num_tiles].cpu(), wanted.groups.tile_groups)


def compile_host(source: Path, library: Path, *options: str) -> Path:
    """Compile one C++ source into a shared library, without any warning."""
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall"]
    command += ["-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{KERNELS}"]
    subprocess.run([*command, *options, str(source), "-o", str(library)], check=True)
    return library


def emulate(
    library: ctypes.CDLL, case: RouteCase, route: str, seed: int = 0
) -> tuple[RouteSplit, Tensor]:
    """The kernel's split on the host, and the active experts of each rank [W].

    Its threads run in their order, or with a seed in another one each time.
    """
    offsets, copy_ranks, slots, tokens_per_tile, num_pairs = case.arguments
    (num_ranks, num_experts), num_copies = case.counts.shape, copy_ranks.shape[1]
    most_tiles = num_pairs // tokens_per_tile + min(num_experts, num_pairs)

    def room(*shape: int) -> Tensor:
        return torch.full(shape, -7, dtype=torch.int32)

    segments = room(num_ranks, num_experts, num_copies, 2)
    group_offsets, tile_offsets = room(num_experts + 1), room(num_experts + 1)
    tile_groups, rank_pairs, active = room(most_tiles + 1), room(num_ranks), room(num_ranks)
    made = (segments, group_offsets, tile_offsets, tile_groups, rank_pairs, active)
    sizes = (offsets.stride(0), num_ranks, num_experts, num_copies, case.rank)
    levels = case.levels
    num_levels = 0 if levels is None else len(levels)
    choices = (ROUTE_NUMBERS[route], case.sweeps, tokens_per_tile, most_tiles, num_levels)
    pointers = [tensor.data_ptr() for tensor in (offsets, copy_ranks, *made)]
    pointers.append(0 if levels is None else levels.data_ptr())
    library.run_route.restype = ctypes.c_bool
    arguments = RouteSplitArgs(*pointers, *sizes, *choices)
    assert library.run_route(ctypes.byref(arguments), ctypes.c_uint(seed))
    assert tile_groups[most_tiles] == -7, "nothing is written behind the table"
    groups = PairGroups(slots, group_offsets, tile_offsets, tile_groups, tokens_per_tile, num_pairs)
    return RouteSplit(segments, groups, rank_pairs), active
