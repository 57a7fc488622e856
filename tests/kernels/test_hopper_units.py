"""Which units Hopper's producer brings to which CTA, on the host: its own ones or claimed ones,
each once and whole, whoever comes first; and what it leaves for the next launch.
"""

from __future__ import annotations

import ctypes
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.route_cases import compile_host

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "cute_kernels"
SOURCES = (
    "hopper_producer.cuh",
    "hopper_units.cuh",
    "hopper_tile.cuh",
    "hopper_launch.h",
    "tile_memory.h",
    "tile_scheduler.h",
    "light_ops.h",
)
TOKENS, BLOCK_FEATURES = 16, 64  # of a tile
SLOT_OF_GROUP = 100  # slot of group g: that + g
POINTER, INT = ctypes.c_void_p, ctypes.c_int


class Groups(ctypes.Structure):
    """light_pair_groups."""

    _fields_ = (
        *((name, POINTER) for name in ("slots", "offsets", "tile_offsets", "tile_groups")),
        ("num_groups", INT),
        ("num_pairs", INT),
    )


class Arguments(ctypes.Structure):
    """light_grouped_gemm_args."""

    _fields_ = (
        ("groups", Groups),
        *((name, POINTER) for name in ("rows", "pair_row", "weights")),
        ("slot_bytes", ctypes.c_longlong),
        *((name, POINTER) for name in ("pair_weight", "output", "output_rows")),
        *((name, INT) for name in ("depth", "num_features", "swiglu", "output_float32")),
        *((name, POINTER) for name in ("split_sums", "split_tickets")),
        ("depth_splits", INT),
        ("groups_settled", INT),
        ("unit_ticket", POINTER),
    )


class Run(ctypes.Structure):
    """Run of producer.cpp."""

    _fields_ = (
        ("args", Arguments),
        *((name, INT) for name in ("tokens", "num_stages", "num_ctas", "num_scale_threads")),
        *((name, INT) for name in ("num_late", "late_after", "consumer_turns")),
        ("seed", ctypes.c_uint),
        ("most_units", INT),
        ("units", POINTER),
        ("num_units", INT),
        ("num_wrong", INT),
    )


@dataclass
class Launch:
    """A product of groups of so many pairs, on so many CTAs."""

    counts: list[int]
    num_ctas: int
    depth: int = 128
    num_features: int = 136
    num_stages: int = 3
    claims: bool = True
    gathers: bool = False
    settled: bool = False
    num_scale_threads: int = 0
    num_late: int = 0
    late_after: int = 0
    consumer_turns: int = 0  # of all threads, that consumers let pass at each stage
    seed: int = 1
    ticket: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.uint32))

    def units(self) -> Counter[tuple[int, ...]]:
        """(slot, first pair, tokens, block of weights) of each unit there is."""
        found: Counter[tuple[int, ...]] = Counter()
        first = 0
        for group, count in enumerate(self.counts):
            tiles = -(-count // TOKENS)
            each = -(-count // max(tiles, 1))
            share = -(-each // 8) * 8
            for tile in range(tiles):
                tokens = min(share, count - tile * share)
                for block in range(-(-self.num_features // BLOCK_FEATURES)):
                    found[SLOT_OF_GROUP + group, first + tile * share, tokens, block] += 1
            first += count
        return found

    def run(self, producer: ctypes.CDLL) -> list[list[tuple[int, ...]]]:
        """The units that the consumers of each CTA saw, in their order."""
        tiles = [-(-count // TOKENS) for count in self.counts]
        tables = {
            "slots": SLOT_OF_GROUP + np.arange(len(self.counts)),
            "offsets": np.cumsum([0, *self.counts]),
            "tile_offsets": np.cumsum([0, *tiles]),
            "tile_groups": np.repeat(np.arange(len(tiles)), tiles),
        }
        tables = {name: np.ascontiguousarray(table, np.int32) for name, table in tables.items()}
        num_pairs, most = sum(self.counts), 2 * self.units().total() + 8
        pair_row = np.random.default_rng(0).permutation(num_pairs).astype(np.int32)
        seen = np.full((most, 5), -1, dtype=np.int32)
        args = Arguments(
            groups=Groups(*(t.ctypes.data for t in tables.values()), len(tiles), num_pairs + 5),
            rows=1 << 20,
            pair_row=pair_row.ctypes.data if self.gathers else None,
            depth=self.depth,
            num_features=self.num_features,
            groups_settled=self.settled,
            unit_ticket=self.ticket.ctypes.data if self.claims else None,
        )
        run = Run(args, TOKENS, self.num_stages, self.num_ctas, self.num_scale_threads)
        run.num_late, run.late_after, run.seed = self.num_late, self.late_after, self.seed
        run.consumer_turns = self.consumer_turns
        run.most_units, run.units, before = most, seen.ctypes.data, self.ticket.copy()
        assert producer.run_product(ctypes.byref(run)), "threads wait for each other for ever"
        assert run.num_wrong == 0
        assert self.ticket == before
        units: list[list[tuple[int, ...]]] = [[] for _ in range(self.num_ctas)]
        for cta, *unit in seen[: run.num_units].tolist():
            units[cta].append(tuple(unit))
        return units


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("hopper")
    for path in (*(HERE / "emulator/hopper").iterdir(), *(KERNELS / name for name in SOURCES)):
        shutil.copy(path, folder)  # the stand-in beside the sources, which include it
    source, library = folder / "producer.cpp", folder / "producer.so"
    built = ctypes.CDLL(str(compile_host(source, library, f"-I{HERE / 'emulator'}")))
    built.run_product.restype = ctypes.c_bool
    return built


COUNTS = [[0, 0], [5], [70], [0, 40, 0, 16, 1, 0], [1] * 20, [17, 150, 0, 33]]


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("claims", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_unit_comes_to_one_cta(
    producer: ctypes.CDLL, counts: list[int], claims: bool, gathers: bool
) -> None:
    ticket = np.zeros(1, dtype=np.uint32)
    for seed, (num_ctas, num_stages, depth) in enumerate(
        [(1, 3, 128), (3, 2, 8), (4, 12, 8), (2, 12, 200), (5, 4, 64)], start=1
    ):
        launch = Launch(counts, num_ctas, depth, num_stages=num_stages, ticket=ticket, seed=seed)
        launch.claims, launch.gathers, launch.settled = claims, gathers, seed % 2 == 0
        found = launch.run(producer)
        assert Counter(unit for units in found for unit in units) == launch.units()


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("claims", [False, True])
def test_a_producer_far_ahead_writes_over_nothing(
    producer: ctypes.CDLL, claims: bool, gathers: bool
) -> None:
    for num_stages, depth in ((12, 8), (5, 8), (12, 72)):
        launch = Launch([17, 150, 0, 33], 2, depth, num_stages=num_stages, consumer_turns=50)
        launch.claims, launch.gathers = claims, gathers
        found = launch.run(producer)
        assert Counter(unit for units in found for unit in units) == launch.units()


@pytest.mark.parametrize("claims", [False, True])
@pytest.mark.parametrize("num_scale_threads", [32, 64])
def test_scales_are_those_of_the_unit(
    producer: ctypes.CDLL, num_scale_threads: int, claims: bool
) -> None:
    for gathers in (False, True):
        launch = Launch([17, 150, 0, 33], 3, 200, num_scale_threads=num_scale_threads)
        launch.claims, launch.gathers = claims, gathers
        found = launch.run(producer)
        assert Counter(unit for units in found for unit in units) == launch.units()


def test_cuts_of_own_units_are_even(producer: ctypes.CDLL) -> None:
    launch = Launch([160], 4, claims=False)
    assert [len(units) for units in launch.run(producer)] == [8, 8, 7, 7]


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_cta_that_starts_late_takes_fewer(producer: ctypes.CDLL, seed: int) -> None:
    launch = Launch([160], 4, num_late=1, late_after=15, seed=seed)
    late, *others = (len(units) for units in launch.run(producer))
    assert late + sum(others) == launch.units().total() == 30
    assert 1 <= late <= 6
    assert max(others) - min(others) <= 2

    launch.late_after = 29  # all that others may have: each CTA's first unit is its own
    late, *others = (len(units) for units in launch.run(producer))
    assert late == 1


def test_as_many_units_as_ctas_need_no_ticket(producer: ctypes.CDLL) -> None:
    launch = Launch([32], 6, ticket=np.full(1, 7, dtype=np.uint32))  # no claim would find a unit
    assert [len(units) for units in launch.run(producer)] == [1] * 6
