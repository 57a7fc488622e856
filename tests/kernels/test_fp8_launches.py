"""How fp8_gemm is launched on Hopper, over a driver that tells (drivers.py): the tensor maps of
every tile, what the kernel is told of its stages, and what is refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lightmoe.kernels.tiles import Tile, candidates
from tests.kernels.drivers import BIND, PRODUCT, Call, call, launches, opened
from tests.kernels.test_hopper_launches import (
    HOPPER,
    MOST_SLOTS,
    NUM_GROUPS,
    NUM_MULTIPROCESSORS,
    NUM_PAIRS,
    RESIDENT_THREADS,
    ROWS,
    SLOT_BYTES,
    TAIL_BYTES,
    UINT8,
    WEIGHTS,
    Map,
    maps,
    stage_of,
)

DEPTH, NUM_FEATURES = 208, 264
TILES = [pytest.param(tile, id=tile.name) for tile in candidates(90, 8, 8)]
LARGE = candidates(90, 8, 8)[0]


def fp8_product(compiled: Tile, **changes: object) -> Call:
    """A product with gathered rows, scaled by blocks, to bf16."""
    arguments = {name: value for name, value in PRODUCT.items() if not name.startswith("split")}
    arguments |= {
        "groups": (0, 16, 16, 16, NUM_GROUPS, NUM_PAIRS),
        "tile": compiled.fields,
        "dtype": 1,
        "rows": ROWS,
        "row_scales": 16,
        "pair_row": 16,
        "weights": WEIGHTS,
        "scales": 16,
        "slot_bytes": SLOT_BYTES,
        "depth": DEPTH,
        "num_features": NUM_FEATURES,
        "by_channels": False,
    }
    return ("fp8_gemm", [], arguments | changes)


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A folder of files that pretend to be every instance for sm_90."""
    (tmp_path / "90").mkdir()
    for tile in candidates(90, 8, 8):
        for epilogue in ("plain", "swiglu"):
            (tmp_path / "90" / f"fp8_gemm_bf16_{tile.name}_{epilogue}.cubin").write_text("")
    return tmp_path


def row_box(tokens: int) -> int:
    """Rows of a copy of contiguous rows."""
    return {128: 64}.get(tokens, 16)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_maps_of_weights_and_rows(
    host_library: Path, fake_driver: Path, kernels: Path, tile: Tile, swiglu: bool, gathered: bool
) -> None:
    wanted = fp8_product(tile, swiglu=swiglu, pair_row=16 if gathered else 0)
    found = maps(call(host_library, fake_driver, opened(kernels), BIND, wanted, **HOPPER))

    slots = (MOST_SLOTS, 1, SLOT_BYTES)
    if swiglu:  # 8 gate rows, the 8 up rows beside them, the next 8 gate rows
        features = (8, 8, DEPTH), (2, 2, NUM_FEATURES * DEPTH)
        axes = (*features, (NUM_FEATURES // 8, tile.weight_rows // 16, 8 * DEPTH), slots)
    else:
        axes = ((NUM_FEATURES, tile.weight_rows, DEPTH), slots)
    assert found.pop(WEIGHTS) == Map(((DEPTH, 128, 0), *axes), UINT8, WEIGHTS, swizzled=True)
    if not gathered:
        axes = ((DEPTH, 128, 0), (NUM_PAIRS, row_box(tile.tokens), DEPTH))
        assert found.pop(ROWS) == Map(axes, UINT8, ROWS, swizzled=True)
    assert found == {}


@pytest.mark.parametrize("by_channels", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_a_stage_holds_what_is_copied_into_it_and_two_turns_of_scales(
    host_library: Path, fake_driver: Path, kernels: Path, tile: Tile, by_channels: bool
) -> None:
    wanted = fp8_product(tile, by_channels=by_channels)
    stage = stage_of(call(host_library, fake_driver, opened(kernels), BIND, wanted, **HOPPER))

    weights = tile.weight_rows * tile.depth
    assert stage["weights_bytes"] == stage["tokens"] == weights
    assert stage["scales"] == weights + tile.tokens * tile.depth
    # Of both blocks of weights and of every token, for each 128 of depth, twice.
    end = stage["scales"] + 2 * (tile.depth // 128) * (2 + tile.tokens) * 4
    assert stage["bytes"] == -(-end // 1024) * 1024
    assert (stage["most_tokens"], stage["num_stages"]) == (tile.tokens, tile.stages)
    assert stage["tokens"] % 1024 == 0, "a swizzled panel"
    assert stage["scales"] % 8 == 0, "two of them are read at once"


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_launches_are_persistent_and_take_the_memory_of_their_tile(
    host_library: Path, fake_driver: Path, kernels: Path, tile: Tile, swiglu: bool
) -> None:
    few, wide = (0, 16, 16, 16, NUM_GROUPS, 3), 32768
    calls = [
        fp8_product(tile, swiglu=swiglu, **changes)
        for changes in (
            {"num_features": wide},
            {"num_features": wide, "max_ctas": 5},
            {"groups": few, "pair_row": 0},
        )
    ]
    lines = call(host_library, fake_driver, opened(kernels), BIND, *calls, **HOPPER)

    resident = NUM_MULTIPROCESSORS * max(RESIDENT_THREADS // tile.threads, 1)
    blocks = -(-NUM_FEATURES * (2 if swiglu else 1) // tile.weight_rows)
    stage = stage_of([next(line for line in lines if line.startswith("stage"))])
    shared = tile.stages * stage["bytes"] + TAIL_BYTES
    assert shared == tile.shared_bytes(8)
    assert shared <= 227 << 10
    name = f"fp8_gemm_bf16_{tile.name}_{'swiglu' if swiglu else 'plain'}"
    assert launches(lines) == [
        f"launch {name} grid {grid} block {tile.threads} shared {shared} stream 7 attributes{early}"
        # What leaves multiprocessors to others does not wait on them for its turn.
        for grid, early in ((resident, " 6"), (5, ""), (3 * blocks, " 6"))
    ]


def test_one_matrix_has_one_slot(host_library: Path, fake_driver: Path, kernels: Path) -> None:
    changes = {"groups": (0, 0, 0, 0, 1, NUM_PAIRS), "slot_bytes": 0, "pair_row": 0}
    lines = call(
        host_library, fake_driver, opened(kernels), BIND, fp8_product(LARGE, **changes), **HOPPER
    )
    assert maps(lines)[WEIGHTS].axes[-1] == (1, 1, 16)
    tiles = -(-NUM_PAIRS // LARGE.tokens) * -(-NUM_FEATURES // LARGE.weight_rows)
    assert f" grid {tiles} " in launches(lines)[0]


def test_nothing_to_compute_maps_and_launches_nothing(
    host_library: Path, fake_driver: Path, kernels: Path
) -> None:
    empty = {
        "groups": (0, 16, 16, 16, NUM_GROUPS, 0), "rows": 0, "row_scales": 0, "output": 0,
    }  # fmt: skip
    lines = call(
        host_library, fake_driver, opened(kernels), BIND, fp8_product(LARGE, **empty), **HOPPER
    )
    assert lines[-1] == "fp8_gemm: 0"
    assert maps(lines) == {}
    assert launches(lines) == []


def changed(**fields: int) -> tuple[int, ...]:
    """The fields of a tile that differs from a compiled one."""
    names = ["weight_rows", "tokens", "depth", "stages", "warps_weight", "warps_tokens"]
    names += ["half_accumulate", "limit", "depth_parts"]
    return tuple((dict(zip(names, LARGE.fields, strict=True)) | fields).values())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tile": changed(limit=0)}, "limit 0 and depth 128 of a tile; it needs one of warpgroups"),
        ({"tile": changed(depth=64)}, "limit 128 and depth 64 of a tile; it needs one of warp"),
        ({"tile": changed(tokens=144)}, "a tile of 144 tokens (8, or 16, 32 .. 128), "),
        ({"dtype": 2}, "dtype 2 is neither fp16 nor bf16"),
        ({"depth": 200}, "depth 200 and 264 features must be multiples of 16 and of 8"),
        ({"depth": 0}, "depth 0 and 264 features must be multiples of 16 and of 8"),
        ({"num_features": 12}, "depth 208 and 12 features must be multiples of 16 and of 8"),
        ({"rows": 0}, "rows or weights is null, or output and output_rows both"),
        ({"scales": 0}, "no scales of weights or of rows"),
        ({"row_scales": 0}, "no scales of weights or of rows"),
        ({"swiglu": True, "output_float32": True}, "swiglu has no float32 output"),
    ],
    ids=str,
)
def test_bad_arguments(
    host_library: Path, fake_driver: Path, kernels: Path, changes: dict, text: str
) -> None:
    wanted = fp8_product(LARGE, **changes)
    lines = call(host_library, fake_driver, opened(kernels), BIND, wanted, **HOPPER)
    assert lines[-1].startswith(f"fp8_gemm: 4 fp8_gemm: {text}")
    assert maps(lines) == {}
    assert launches(lines) == []


def test_another_card_has_no_such_kernel(
    host_library: Path, fake_driver: Path, kernels: Path
) -> None:
    (kernels / "80").mkdir()
    lines = call(
        host_library, fake_driver, opened(kernels), BIND, fp8_product(LARGE), FAKE_CAPABILITY=80
    )
    assert lines[-1].startswith("fp8_gemm: 3 ")
    assert launches(lines) == []
