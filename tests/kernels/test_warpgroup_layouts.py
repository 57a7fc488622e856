"""Proofs on the host for Hopper's tiles: gathered rows lie where the tensor cores read them, sums
and packed weights in the registers where warpgroup mma has them, outputs change places without bank
conflicts.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from lightmoe.kernels.tiles import candidates
from tests.kernels.layouts.host import KERNELS, compile_library, cute_includes
from tests.kernels.layouts.packed import packed_positions

NUM_BANKS, BANK_BYTES = 32, 4
PHASE = 8  # lanes that touch shared memory together when each takes 16 bytes
PANEL_DEPTH = 64
WIDTHS = [8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176]
THREADS = np.arange(128)
FORMATS = [(16, 16), (8, 16), (4, 16), (8, 8)]  # bits of a weight, and of an element of a row
TILES = [
    pytest.param(tile.weight_rows // 64 // (tile.warps_weight // 4), swiglu, id=f"{name}-{swiglu=}")
    for num_bits, row_bits in FORMATS
    for name, tile in {tile.name: tile for tile in candidates(90, num_bits, row_bits)}.items()
    for swiglu in (False, True)
]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    widths = "".join(f"WIDTH({width})" for width in WIDTHS)
    folder: Path = tmp_path_factory.mktemp("warpgroup")
    return compile_library("warpgroup.cpp", folder, cute_includes(), [f"LIGHT_WIDTHS={widths}"])


def fragment(layouts: ctypes.CDLL, width: int, operand: str) -> tuple[np.ndarray, np.ndarray]:
    """Row and column [128 threads, values] of each value of an operand with 64 rows."""
    out = np.full(128 * 88, -1, dtype=np.int32)
    name = ctypes.c_char(operand.encode())
    address = ctypes.c_void_p(out.ctypes.data)
    num_values = layouts.mma_fragment(WIDTHS.index(width), name, address)
    index = out[: 128 * num_values].reshape(128, num_values)
    return index % 64, index // 64


def test_the_widths_are_the_kernels() -> None:
    text = (KERNELS / "hopper_kernel.cuh").read_text()
    for tokens in {tile.limit for bits in FORMATS for tile in candidates(90, *bits)}:
        listed = ", ".join(str(width) for width in WIDTHS if width <= tokens)
        assert f"struct MmaWidths<{tokens}> {{\n  using List = cute::int_sequence<{listed}>" in text


def test_a_gathered_panel_is_the_one_that_the_tensor_cores_read(layouts: ctypes.CDLL) -> None:
    for row in range(256):
        for depth in range(PANEL_DEPTH):
            offset = layouts.panel_offset(row, depth // 8) + depth % 8 * 2
            assert offset == 2 * layouts.panel_of_cute(row, depth), (row, depth)


def test_a_gathered_panel_in_e4m3_is_the_one_that_the_tensor_cores_read(
    layouts: ctypes.CDLL,
) -> None:
    for row in range(256):
        for depth in range(2 * PANEL_DEPTH):
            offset = layouts.panel_offset(row, depth // 16) + depth % 16
            assert offset == layouts.panel_of_cute_in_bytes(row, depth), (row, depth)


def test_rows_are_gathered_without_bank_conflicts(layouts: ctypes.CDLL) -> None:
    offsets = [[layouts.panel_offset(row, chunk) for chunk in range(8)] for row in range(16)]

    assert_no_conflict(np.array(offsets))  # eight threads gather a row


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_lie_where_the_epilogue_takes_them(layouts: ctypes.CDLL, width: int) -> None:
    row, token = fragment(layouts, width, "C")

    value, thread = np.arange(width // 2), THREADS[:, None]
    assert np.array_equal(row, thread // 32 * 16 + thread % 32 // 4 + value % 4 // 2 * 8)
    assert np.array_equal(token, value // 4 * 8 + thread % 4 * 2 + value % 2)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_packed_weights_lie_where_the_mma_takes_them(
    layouts: ctypes.CDLL, width: int, num_bits: int
) -> None:
    rows, depths = fragment(layouts, width, "A")
    row, depth = packed_positions(num_bits)

    for warp in range(4):
        own = slice(32 * warp, 32 * warp + 32)
        for step in range(4):
            assert np.array_equal(rows[own], 16 * warp + row[:, step].reshape(32, 8))
            assert np.array_equal(depths[own], depth[:, step].reshape(32, 8) - 16 * step)


def assert_no_conflict(offsets: np.ndarray) -> None:
    """Offsets in bytes [phases, 8 lanes] of 16 each: all banks, each once, in every phase."""
    assert offsets.shape[-1] == PHASE
    assert (offsets % 16 == 0).all(), "16 bytes that are not aligned"
    first_bank = offsets // BANK_BYTES % NUM_BANKS
    banks = (first_bank[..., None] + np.arange(4)).reshape(-1, NUM_BANKS)
    assert (np.sort(banks, axis=1) == np.arange(NUM_BANKS)).all()


@pytest.mark.parametrize("tokens", sorted({tile.tokens for tile in candidates(90, 8, 8)}))
def test_scales_are_written_and_read_without_bank_conflicts(
    layouts: ctypes.CDLL, tokens: int
) -> None:
    of_token = np.array([layouts.token_scale(token) for token in range(tokens)])

    # Both blocks of weights come first.
    assert np.array_equal(np.sort(of_token), 8 + 4 * np.arange(tokens))
    assert layouts.scale_list_bytes(tokens) == 8 + 4 * tokens
    assert layouts.scale_list_bytes(tokens) % 8 == 0, "the next list begins at two scales' border"
    # A warp writes one scale a lane.
    for first in range(0, tokens, 32):
        banks = of_token[first : first + 32] // BANK_BYTES % NUM_BANKS
        assert len(set(banks)) == len(banks)
    # It reads two a lane, of the tokens whose sums the lane has: the same for every four lanes.
    lane = np.arange(32)
    for eight in range(0, tokens, 8):
        both = of_token[eight + lane % 4 * 2][:, None] + np.array([0, BANK_BYTES])
        assert np.array_equal(both[:, 1], of_token[eight + lane % 4 * 2 + 1])
        assert (both[:, 0] % 8 == 0).all()
        words = np.unique(both)
        assert len(set(words // BANK_BYTES % NUM_BANKS)) == len(words)


@pytest.mark.parametrize(("num_blocks", "swiglu"), TILES)
def test_outputs_change_places_without_bank_conflicts(
    layouts: ctypes.CDLL, num_blocks: int, swiglu: bool
) -> None:
    row_chunks = num_blocks * (4 if swiglu else 8)
    num_tokens = 64
    offsets = np.array(
        [
            [layouts.output_offset(row_chunks, token, chunk) for chunk in range(row_chunks)]
            for token in range(num_tokens)
        ]
    )

    assert np.array_equal(np.sort(offsets, axis=None), 16 * np.arange(offsets.size))
    # A matrix of stmatrix is a chunk of eight tokens.
    assert_no_conflict(offsets.reshape(-1, PHASE, row_chunks).swapaxes(1, 2))
    # A thread reads chunk thread % row_chunks of token thread / row_chunks, and so on.
    assert_no_conflict(offsets.reshape(-1, PHASE))
