"""How the matrix stems are launched on Hopper's warpgroups, over a driver that tells (drivers.py):
the tensor maps of every tile, what the kernel is told of its stages, and what is refused.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

from lightmoe.kernels.products import Plan
from lightmoe.kernels.tiles import Tile, candidates
from tests.kernels.drivers import BIND, PRODUCT, Call, call, launches, opened

wrapper = importlib.import_module("lightmoe.kernels.grouped_gemm")  # the package's is a function
HOPPER = {"FAKE_CAPABILITY": 90}
NUM_MULTIPROCESSORS, RESIDENT_THREADS = 68, 512  # as fake_driver.cpp answers
NUM_PAIRS, NUM_GROUPS, DEPTH, NUM_FEATURES = 1000, 8, 200, 264
SLOT_BYTES = 1 << 20
MOST_SLOTS = 1 << 16
UINT8, UINT32, BFLOAT16 = 0, 2, 9  # CUtensorMapDataType: test_library.py compares with cuda.h
ELEMENT_BYTES = {UINT8: 1, UINT32: 4, BFLOAT16: 2}
SWIZZLE_128_BYTES, PROMOTE_256_BYTES = 3, 3
ROWS, WEIGHTS, SCALES, ZEROS = 1 << 20, 2 << 20, 3 << 20, 4 << 20
TAIL_BYTES = 2 * 12 * 8 + 16 * 16  # beside the stages: two barriers for each of 12, 16 units
MAP = re.compile(r"map((?: \S+)+) type (\d+) at (\d+) swizzle (\d+) promotion (\d+)$")
AXIS = re.compile(r"(\d+)/(\d+)(?:@(\d+))?")
TILES = [
    pytest.param(num_bits, tile, id=f"{num_bits}-{tile.name}-t{tile.tokens}")
    for num_bits in (16, 8, 4)
    for tile in candidates(90, num_bits)
]


@dataclass(frozen=True)
class Map:
    """A tensor map: its axes as (extent, box, bytes to the next; 0 for the innermost)."""

    axes: tuple[tuple[int, int, int], ...]
    dtype: int
    address: int
    swizzled: bool

    @classmethod
    def parse(cls, line: str) -> Map:
        found = MAP.fullmatch(line)
        assert found is not None, line
        assert int(found[5]) == PROMOTE_256_BYTES
        axes = tuple(
            (int(extent), int(box), int(stride or 0))
            for extent, box, stride in AXIS.findall(found[1])
        )
        swizzled = {0: False, SWIZZLE_128_BYTES: True}[int(found[4])]
        return cls(axes, int(found[2]), int(found[3]), swizzled)

    @property
    def box_bytes(self) -> int:
        """What one copy brings."""
        total = ELEMENT_BYTES[self.dtype]
        for _, box, _ in self.axes:
            total *= box
        return total


def hopper_product(num_bits: int, compiled: Tile, **changes: object) -> Call:
    """A product in bf16 with gathered rows."""
    stem = "grouped_gemm" if num_bits == 16 else "quant_gemm"
    arguments = PRODUCT | {
        "groups": (0, 16, 16, 16, NUM_GROUPS, NUM_PAIRS),
        "tile": compiled.fields,
        "dtype": 1,
        "rows": ROWS,
        "pair_row": 16,
        "weights": WEIGHTS,
        "slot_bytes": SLOT_BYTES,
        "depth": DEPTH,
        "num_features": NUM_FEATURES,
    }
    if num_bits != 16:
        quantised = {"scales": SCALES, "zeros": ZEROS, "num_bits": num_bits, "group_size": 32}
        arguments |= quantised
    return (stem, [], arguments | changes)


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A folder of files that pretend to be every instance for sm_90."""
    (tmp_path / "90").mkdir()
    for num_bits in (16, 8, 4):
        for tile in candidates(90, num_bits):
            for epilogue in ("plain", "swiglu"):
                (tmp_path / "90" / f"{kernel_name(num_bits, tile, epilogue)}.cubin").write_text("")
    return tmp_path


def kernel_name(num_bits: int, tile: Tile, epilogue: str) -> str:
    stem = "grouped_gemm_bf16" if num_bits == 16 else f"quant_gemm_bf16_int{num_bits}"
    return f"{stem}_{tile.name}_{epilogue}"


def maps(lines: list[str]) -> dict[int, Map]:
    """By the address of what they map."""
    found = [Map.parse(line) for line in lines if line.startswith("map")]
    by_address = {found_map.address: found_map for found_map in found}
    assert len(by_address) == len(found)
    return by_address


def stage_of(lines: list[str]) -> dict[str, int]:
    (line,) = (line for line in lines if line.startswith("stage"))
    names = ("tokens", "scales", "zeros", "bytes", "weights_bytes", "most_tokens", "num_stages")
    return dict(zip(names, map(int, line.split()[1:]), strict=True))


def row_box(tokens: int) -> int:
    """Rows of a copy of contiguous rows."""
    return {176: 88, 128: 64}.get(tokens, 16)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("tile", candidates(90, 16), ids=lambda tile: tile.name)
def test_maps_of_plain_weights_and_rows(
    host_library: Path, fake_driver: Path, kernels: Path, tile: Tile, swiglu: bool, gathered: bool
) -> None:
    wanted = hopper_product(16, tile, swiglu=swiglu, pair_row=16 if gathered else 0)
    found = maps(call(host_library, fake_driver, opened(kernels), BIND, wanted, **HOPPER))

    row = 2 * DEPTH
    slots = (MOST_SLOTS, 1, SLOT_BYTES)
    if swiglu:  # 8 gate rows, the 8 up rows beside them, the next 8 gate rows
        features = (8, 8, row), (2, 2, NUM_FEATURES * row)
        axes = (*features, (NUM_FEATURES // 8, tile.weight_rows // 16, 8 * row), slots)
    else:
        axes = ((NUM_FEATURES, tile.weight_rows, row), slots)
    assert found.pop(WEIGHTS) == Map(((DEPTH, 64, 0), *axes), BFLOAT16, WEIGHTS, swizzled=True)
    if not gathered:
        axes = ((DEPTH, 64, 0), (NUM_PAIRS, row_box(tile.tokens), row))
        assert found.pop(ROWS) == Map(axes, BFLOAT16, ROWS, swizzled=True)
    assert found == {}


@pytest.mark.parametrize(("group_size", "has_zeros"), [(32, True), (64, True), (128, False)])
@pytest.mark.parametrize(
    ("num_bits", "tile"), [parameters for parameters in TILES if parameters.values[0] != 16]
)
def test_maps_of_packed_weights(
    host_library: Path,
    fake_driver: Path,
    kernels: Path,
    num_bits: int,
    tile: Tile,
    group_size: int,
    has_zeros: bool,
) -> None:
    changes = {"group_size": group_size, "zeros": ZEROS if has_zeros else 0}
    wanted = hopper_product(num_bits, tile, **changes)
    found = maps(call(host_library, fake_driver, opened(kernels), BIND, wanted, **HOPPER))

    blocks, depth_blocks = 17, 4  # of 16 rows and of 64 of depth: 264 and 200, filled up
    block_bytes, box_blocks = 16 * 64 * num_bits // 8, tile.weight_rows // 16
    num_groups = depth_blocks * 64 // group_size
    slots = (MOST_SLOTS, 1, SLOT_BYTES)
    codes = (
        (block_bytes // 4, block_bytes // 4, 0),
        (depth_blocks, tile.depth // 64, block_bytes),
        (blocks, box_blocks, depth_blocks * block_bytes),
        slots,
    )
    assert found.pop(WEIGHTS) == Map(codes, UINT32, WEIGHTS, swizzled=False)
    numbers = (
        (16, 16, 0),
        (num_groups, max(tile.depth // group_size, 1), 32),
        (blocks, box_blocks, num_groups * 32),
        slots,
    )
    for address in (SCALES, ZEROS) if has_zeros else (SCALES,):
        assert found.pop(address) == Map(numbers, BFLOAT16, address, swizzled=False)
    assert found == {}


@pytest.mark.parametrize(("num_bits", "tile"), TILES)
def test_maps_are_what_the_copy_engine_takes(
    host_library: Path, fake_driver: Path, kernels: Path, num_bits: int, tile: Tile
) -> None:
    """CUDA driver API, cuTensorMapEncodeTiled: what it says of strides, boxes and swizzle."""
    for group_size in (32, 64, 128) if num_bits != 16 else (0,):
        changes = {"group_size": group_size} if group_size else {}
        wanted = hopper_product(num_bits, tile, pair_row=0, swiglu=True, **changes)
        found = maps(call(host_library, fake_driver, opened(kernels), BIND, wanted, **HOPPER))

        assert len(found) == (2 if num_bits == 16 else 4)
        for found_map in found.values():
            assert 2 <= len(found_map.axes) <= 5
            inner_bytes = found_map.axes[0][1] * ELEMENT_BYTES[found_map.dtype]
            assert inner_bytes % 16 == 0
            assert inner_bytes == 128 or not found_map.swizzled
            assert all(1 <= box <= 256 for _, box, _ in found_map.axes)
            assert all(1 <= extent <= 1 << 32 for extent, _, _ in found_map.axes)
            assert all(stride % 16 == 0 for _, _, stride in found_map.axes)
            assert all(0 < stride < 1 << 40 for _, _, stride in found_map.axes[1:])


@pytest.mark.parametrize(("num_bits", "tile"), TILES)
def test_a_stage_holds_what_is_copied_into_it(
    host_library: Path, fake_driver: Path, kernels: Path, num_bits: int, tile: Tile
) -> None:
    lines = call(
        host_library,
        fake_driver,
        opened(kernels),
        BIND,
        hopper_product(num_bits, tile, pair_row=0),
        **HOPPER,
    )
    found, stage = maps(lines), stage_of(lines)

    panels = tile.depth // 64
    rows = found.pop(ROWS)
    weights = found[WEIGHTS].box_bytes * (panels if num_bits == 16 else 1)
    assert stage["tokens"] == weights
    copies_of_rows = -(-tile.tokens // rows.axes[1][1])
    assert rows.box_bytes * copies_of_rows == tile.tokens * 128, "more rows than a panel has"
    end = weights + panels * tile.tokens * 128
    assert stage["scales"] == end
    if num_bits != 16:
        scales, zeros = found[SCALES].box_bytes, found[ZEROS].box_bytes
        assert stage["zeros"] == end + scales
        assert stage["weights_bytes"] == weights + scales + zeros
        end += scales + zeros
    else:
        assert stage["weights_bytes"] == weights
    assert stage["bytes"] == -(-end // 1024) * 1024
    assert (stage["most_tokens"], stage["num_stages"]) == (tile.tokens, tile.stages)
    for part in ("tokens", "scales", "zeros"):
        assert stage[part] % 128 == 0
    assert stage["tokens"] % 1024 == 0
    assert tile.tokens % 8 == 0


@pytest.mark.parametrize(("num_bits", "tile"), TILES)
def test_launches_are_persistent_and_take_the_memory_of_their_tile(
    host_library: Path, fake_driver: Path, kernels: Path, num_bits: int, tile: Tile
) -> None:
    few, wide = (0, 16, 16, 16, NUM_GROUPS, 3), 32768
    calls = [
        hopper_product(num_bits, tile, **changes)
        for changes in (
            {"num_features": wide},
            {"num_features": wide, "max_ctas": 5},
            {"groups": few, "pair_row": 0},
        )
    ]
    lines = call(host_library, fake_driver, opened(kernels), BIND, *calls, **HOPPER)

    threads = 128 * (1 + tile.warps_weight // 4 * tile.depth_parts)
    resident = NUM_MULTIPROCESSORS * max(RESIDENT_THREADS // threads, 1)
    blocks = -(-NUM_FEATURES // tile.weight_rows)
    shared = stage_of_first(lines)["bytes"] * tile.stages + TAIL_BYTES
    assert shared == tile.shared_bytes(num_bits)
    assert shared <= 227 << 10
    name = kernel_name(num_bits, tile, "plain")
    assert launches(lines) == [
        f"launch {name} grid {grid} block {threads} shared {shared} stream 7 attributes{early}"
        # What leaves multiprocessors to others does not wait on them for its turn.
        for grid, early in ((resident, " 6"), (5, ""), (3 * blocks, " 6"))
    ]


def test_ctas_claim_tiles_where_there_is_a_ticket(
    host_library: Path, fake_driver: Path, kernels: Path
) -> None:
    calls = [hopper_product(16, LARGE, **changes) for changes in ({}, {"unit_ticket": 48})]
    lines = call(host_library, fake_driver, opened(kernels), BIND, *calls, **HOPPER)
    assert [line for line in lines if line.startswith("ticket")] == ["ticket 0", "ticket 48"]


@pytest.mark.parametrize(
    ("tile", "num_pairs", "max_ctas", "claims"),
    [
        (candidates(90, 16)[0], 3, None, False),
        (candidates(90, 16)[0], 4096, None, True),
        (candidates(90, 16)[0], 3, 132, True),
        (candidates(80, 16)[0], 4096, 100, False),
    ],
)
def test_products_of_many_tiles_or_beside_other_kernels_have_a_ticket(
    tile: Tile, num_pairs: int, max_ctas: int | None, claims: bool
) -> None:
    rows, weights, output = torch.zeros(3, 16), torch.zeros(1, 8, 16), torch.zeros(3, 8)
    rows, weights, output = rows.half(), weights.half(), output.half()
    ticket, launched = torch.zeros(1, dtype=torch.int32), mock.Mock()
    with (
        mock.patch.object(wrapper, "library", return_value=launched),
        mock.patch.object(wrapper, "unit_ticket", return_value=ticket),
    ):
        wrapper.launch_product(
            (0, 0, 0, 0, 1, num_pairs),
            Plan(tile, tile.fields),
            rows,
            weights,
            output,
            swiglu=False,
            max_ctas=max_ctas,
        )
    arguments = launched.launch.call_args.kwargs
    assert arguments["unit_ticket"] == (ticket.data_ptr() if claims else 0)
    assert arguments["max_ctas"] == (max_ctas or 0)


def stage_of_first(lines: list[str]) -> dict[str, int]:
    return stage_of([next(line for line in lines if line.startswith("stage"))])


@pytest.mark.parametrize(("num_bits", "tile"), TILES)
def test_scales_of_large_groups_leave_memory_free(
    host_library: Path, fake_driver: Path, kernels: Path, num_bits: int, tile: Tile
) -> None:
    changes = {} if num_bits == 16 else {"group_size": 128, "zeros": 0}
    wanted = hopper_product(num_bits, tile, **changes)
    lines = call(host_library, fake_driver, opened(kernels), BIND, wanted, **HOPPER)

    found = re.search(r" shared (\d+) ", launches(lines)[0])
    assert found is not None
    shared = int(found[1])
    assert shared == tile.stages * stage_of(lines)["bytes"] + TAIL_BYTES
    assert shared <= tile.shared_bytes(num_bits)


@pytest.mark.parametrize("num_bits", [16, 4])
def test_one_matrix_has_one_slot(
    host_library: Path, fake_driver: Path, kernels: Path, num_bits: int
) -> None:
    tile = candidates(90, num_bits)[0]
    changes = {"groups": (0, 0, 0, 0, 1, NUM_PAIRS), "slot_bytes": 0, "pair_row": 0}
    lines = call(
        host_library,
        fake_driver,
        opened(kernels),
        BIND,
        hopper_product(num_bits, tile, **changes),
        **HOPPER,
    )
    for address, found in maps(lines).items():
        assert address == ROWS or found.axes[-1] == (1, 1, 16)
    tiles = -(-NUM_PAIRS // tile.tokens) * -(-NUM_FEATURES // tile.weight_rows)
    assert f" grid {tiles} " in launches(lines)[0]


@pytest.mark.parametrize(("num_bits", "tile"), TILES)
def test_nothing_to_compute_maps_and_launches_nothing(
    host_library: Path, fake_driver: Path, kernels: Path, num_bits: int, tile: Tile
) -> None:
    empty = {"groups": (0, 16, 16, 16, NUM_GROUPS, 0), "rows": 0, "output": 0}
    lines = call(
        host_library,
        fake_driver,
        opened(kernels),
        BIND,
        hopper_product(num_bits, tile, **empty),
        **HOPPER,
    )
    stem = "grouped_gemm" if num_bits == 16 else "quant_gemm"
    assert lines[-1] == f"{stem}: 0"
    assert maps(lines) == {}
    assert launches(lines) == []


LARGE = candidates(90, 16)[0]


def changed(**fields: int) -> tuple[int, ...]:
    """The fields of a tile that differs from a compiled one."""
    names = ["weight_rows", "tokens", "depth", "stages", "warps_weight", "warps_tokens"]
    names += ["half_accumulate", "limit", "depth_parts"]
    return tuple((dict(zip(names, LARGE.fields, strict=True)) | fields).values())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"depth_splits": 2}, "2 splits of the depth; on warpgroups it has one part"),
        ({"depth_splits": 0}, "0 splits of the depth; on warpgroups it has one part"),
        ({"tile": changed(tokens=192)}, "a tile of 192 tokens (8, or 16, 32 .. 176), 4 stages"),
        ({"tile": changed(tokens=172)}, "a tile of 172 tokens (8, or 16, 32 .. 176), 4 stages"),
        ({"tile": changed(tokens=24)}, "a tile of 24 tokens (8, or 16, 32 .. 176), 4 stages"),
        ({"tile": changed(stages=13)}, "a tile of 176 tokens (8, or 16, 32 .. 176), 13 stages"),
        ({"tile": changed(stages=0)}, "no such tile as grouped_gemm_bf16_w256_n176_d64_2x1_wgmma"),
        ({"tile": changed(depth_parts=0)}, "no such tile as grouped_gemm_bf16_w256_n176_d64_2x0"),
        ({"dtype": 2}, "dtype 2 is neither fp16 nor bf16"),
        ({"depth": 12}, "depth 12 and 264 features must be multiples of 8"),
        ({"rows": 0}, "rows or weights is null, or output and output_rows both"),
        ({"swiglu": True, "output_float32": True}, "swiglu has no float32 output"),
    ],
    ids=str,
)
def test_bad_arguments(
    host_library: Path, fake_driver: Path, kernels: Path, changes: dict, text: str
) -> None:
    wanted = hopper_product(16, LARGE, **changes)
    lines = call(host_library, fake_driver, opened(kernels), BIND, wanted, **HOPPER)
    assert lines[-1].startswith(f"grouped_gemm: 4 grouped_gemm: {text}")
    assert maps(lines) == {}
    assert launches(lines) == []


def test_more_stages_than_there_is_memory(
    host_library: Path, fake_driver: Path, kernels: Path
) -> None:
    wanted = hopper_product(16, LARGE, tile=changed(stages=5))
    lines = call(host_library, fake_driver, opened(kernels), BIND, wanted, **HOPPER)
    assert lines[-1].endswith("needs 276928 bytes of shared memory, a CTA here has 232448")


@pytest.mark.parametrize("stem", ["grouped_gemm", "quant_gemm"])
def test_a_map_that_the_driver_refuses(
    host_library: Path, fake_driver: Path, kernels: Path, stem: str
) -> None:
    num_bits = 16 if stem == "grouped_gemm" else 4
    wanted = hopper_product(num_bits, candidates(90, num_bits)[0])
    lines = call(host_library, fake_driver, opened(kernels), BIND, wanted, **HOPPER, FAKE_MAP=1)
    assert lines[-1] == f"{stem}: 5 {stem}: CUDA_ERROR_OF_THE_FAKE (1): as the test wanted"
    assert launches(lines) == []
