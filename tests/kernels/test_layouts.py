"""Proofs on the host, for every tile of a warp's mma: each element of a tile in shared memory once,
no bank met twice in a phase of ldmatrix or of a store, each fragment where CuTe's atoms want it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.layouts.host import compile_library, cute_includes, kernels_module
from tests.kernels.layouts.packed import packed_positions

NUM_BANKS = 32  # of 4 bytes
PHASE = 8  # lanes that touch shared memory together when each takes 16 bytes
WEIGHTS, TOKENS, NARROW_TOKENS = range(3)  # pieces
SM75, SM75_HALF, SM80_FLOAT16, SM80_BFLOAT16 = ATOMS = range(4)
LANES = np.arange(32)


def tiles_in_use() -> list[tuple[int, int, int]]:
    """(rows, depth, threads) of both operands of all instances of a warp's mma."""
    instances = kernels_module("instances")
    return sorted(
        {
            (rows, tile.depth, tile.threads)
            for architecture in (75, 80, 86, 89, 90)
            for stem in instances.MATRIX_BITS
            for tile in instances.tiles(stem, architecture)
            if not tile.limit
            for rows in (tile.weight_rows, tile.tokens)
        }
    )


TILES = tiles_in_use()
# A tile of 8 tokens is read by the narrow piece only.
PIECES_OF_TILES = [
    (tile, kind)
    for tile in TILES
    for kind in (WEIGHTS, TOKENS, NARROW_TOKENS)
    if tile[0] >= 16 or kind == NARROW_TOKENS
]


class Layouts:
    """The compiled headers, as arrays."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def offsets(self, tile: tuple[int, int, int]) -> np.ndarray:
        """Elements from the start of the tile to [row, depth]."""
        rows, depth, _ = tile
        out = np.full((rows, depth), -1, dtype=np.int32)
        self._library.tile_offsets(TILES.index(tile), _address(out))
        return out

    def stores(self, tile: tuple[int, int, int]) -> np.ndarray:
        """[steps, threads, (row, depth)] of the 16 bytes that each thread stores."""
        steps = []
        num_steps = 1
        while len(steps) < num_steps:
            out = np.full((tile[2], 2), -1, dtype=np.int32)
            index = TILES.index(tile)
            num_steps = self._library.tile_stores(index, len(steps), _address(out))
            steps.append(out)
        return np.stack(steps)

    def piece(self, kind: int) -> np.ndarray:
        """[32 lanes, (row, depth)] of the 16 bytes that each lane names to ldmatrix.x4."""
        out = np.full((32, 2), -1, dtype=np.int32)
        for lane in LANES:
            self._library.piece(kind, int(lane), _address(out[lane]))
        return out

    def fragment(self, atom: int, operand: str) -> tuple[np.ndarray, np.ndarray]:
        """Row and column [32 lanes, values] of each value of an operand, by CuTe's MMA_Traits."""
        out = np.full(32 * 8, -1, dtype=np.int32)
        name = ctypes.c_char(operand.encode())
        num_values = self._library.mma_fragment(atom, name, _address(out))
        index = out[: 32 * num_values].reshape(32, num_values)
        num_rows = 8 if operand == "B" else 16  # B is [column, depth]
        return index % num_rows, index // num_rows


def _address(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    tiles = "".join(f"TILE({rows},{depth},{threads})" for rows, depth, threads in TILES)
    folder: Path = tmp_path_factory.mktemp("layouts")
    defines = [f"LIGHT_TILES={tiles}"]
    return Layouts(compile_library("layouts.cpp", folder, cute_includes(), defines))


def assert_no_conflict(offsets: np.ndarray) -> None:
    """Element offsets [phases, 8 lanes] of 16 bytes each: all banks, each once, in every phase."""
    assert offsets.shape[-1] == PHASE
    assert (offsets % 8 == 0).all(), "16 bytes that are not aligned"
    first_bank = offsets * 2 // 4 % NUM_BANKS
    banks = (first_bank[..., None] + np.arange(4)).reshape(-1, NUM_BANKS)
    assert (np.sort(banks, axis=1) == np.arange(NUM_BANKS)).all()


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_tile_holds_each_element_once(layouts: Layouts, tile: tuple[int, int, int]) -> None:
    offsets = layouts.offsets(tile)

    assert np.array_equal(np.sort(offsets, axis=None), np.arange(offsets.size))
    chunks = offsets.reshape(tile[0], -1, 8)
    assert (chunks == chunks[..., :1] + np.arange(8)).all(), "16 bytes that do not lie together"


def pieces(tile: tuple[int, int, int], kind: int, piece: np.ndarray) -> np.ndarray:
    """(row, depth) of each lane, for every place [..., 32, 2] of a piece in the tile."""
    height, width = (8, 32) if kind == NARROW_TOKENS else (16, 16)
    rows = np.arange(0, tile[0] - height + 1, height)
    depths = np.arange(0, tile[1], width)
    corners = np.stack(np.meshgrid(rows, depths, indexing="ij"), axis=-1)
    return corners[:, :, None, :] + piece


@pytest.mark.parametrize(("tile", "kind"), PIECES_OF_TILES, ids=str)
def test_ldmatrix_reads_without_bank_conflicts(
    layouts: Layouts, tile: tuple[int, int, int], kind: int
) -> None:
    offsets = layouts.offsets(tile)
    places = pieces(tile, kind, layouts.piece(kind))
    read = offsets[places[..., 0], places[..., 1]]

    assert_no_conflict(read.reshape(-1, PHASE))
    covered = (read[..., None] + np.arange(8)).ravel()
    assert np.array_equal(np.sort(covered), np.arange(offsets.size)), "not each element once"


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_stores_cover_the_tile_without_bank_conflicts(
    layouts: Layouts, tile: tuple[int, int, int]
) -> None:
    offsets = layouts.offsets(tile)
    phases = layouts.stores(tile).reshape(-1, PHASE, 2)
    inside = phases[..., 0] < tile[0]
    assert (inside.all(axis=1) | ~inside.any(axis=1)).all(), "a phase of which some threads store"
    stored = phases[inside.all(axis=1)]

    written = offsets[stored[..., 0], stored[..., 1]]
    assert_no_conflict(written)
    covered = (written[..., None] + np.arange(8)).ravel()
    assert np.array_equal(np.sort(covered), np.arange(offsets.size)), "not each element once"


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_eight_rows_on_and_a_step_of_depth_are_reached_without_the_layout(
    layouts: Layouts, tile: tuple[int, int, int]
) -> None:
    rows, depth, _ = tile
    offsets = layouts.offsets(tile)

    by_eight = offsets.reshape(-1, 8, depth)
    assert (by_eight == by_eight[:1] + np.arange(rows // 8)[:, None, None] * 8 * depth).all()
    first = offsets[:, :16]
    for step in range(depth // 16):
        assert np.array_equal(offsets[:, step * 16 : step * 16 + 16], first ^ (step * 16))


def loaded(piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and depth [32 lanes, 4 registers, lo and hi] that ldmatrix.x4 brings to each lane."""
    rows, depths = piece.reshape(4, 8, 2).transpose(2, 0, 1)  # by matrix and its row
    row = rows.T[LANES // 4][..., None].repeat(2, axis=2)
    depth = depths.T[LANES // 4][..., None] + (LANES % 4 * 2)[:, None, None] + np.arange(2)
    return row, depth


def assert_operand(
    layouts: Layouts, atom: int, operand: str, row: np.ndarray, depth: np.ndarray
) -> None:
    """Row and depth [32, registers, 2] are what the atom, or two atoms of half its depth, take."""
    rows, depths = layouts.fragment(atom, operand)
    num_values = rows.shape[1]
    per_atom = row.reshape(32, -1, num_values), depth.reshape(32, -1, num_values)
    for index in range(per_atom[0].shape[1]):
        assert np.array_equal(per_atom[0][:, index], rows)
        assert np.array_equal(per_atom[1][:, index], depths + index * (depths.max() + 1))


@pytest.mark.parametrize("atom", ATOMS)
def test_ldmatrix_brings_the_weights_where_the_atoms_take_them(layouts: Layouts, atom: int) -> None:
    assert_operand(layouts, atom, "A", *loaded(layouts.piece(WEIGHTS)))


@pytest.mark.parametrize("atom", ATOMS)
def test_ldmatrix_brings_the_tokens_where_the_atoms_take_them(layouts: Layouts, atom: int) -> None:
    row, depth = loaded(layouts.piece(TOKENS))
    for eight in range(2):
        registers = slice(2 * eight, 2 * eight + 2)
        assert_operand(layouts, atom, "B", row[:, registers] - 8 * eight, depth[:, registers])
    assert_operand(layouts, atom, "B", *loaded(layouts.piece(NARROW_TOKENS)))


@pytest.mark.parametrize("atom", ATOMS)
def test_sums_lie_where_the_epilogue_takes_them(layouts: Layouts, atom: int) -> None:
    row, token = layouts.fragment(atom, "C")

    value = np.arange(4)
    assert np.array_equal(row, LANES[:, None] // 4 + value // 2 * 8)
    assert np.array_equal(token, LANES[:, None] % 4 * 2 + value % 2)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("atom", ATOMS)
def test_packed_weights_lie_where_the_atoms_take_them(
    layouts: Layouts, atom: int, num_bits: int
) -> None:
    row, depth = packed_positions(num_bits)

    for step in range(4):
        assert_operand(layouts, atom, "A", row[:, step], depth[:, step] - 16 * step)
