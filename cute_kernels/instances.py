"""Which kernels are compiled for which architecture: the tiles of the matrix stems, and the rest.

A program is one source compiled with one set of defines into one file. A program of a matrix stem
holds one kernel of its own name; the others may hold several.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

FOLDER = Path(__file__).resolve().parent
DTYPES = {"f16": 0, "bf16": 1}
EPILOGUES = {"plain": 0, "swiglu": 1}
ATTENTION_WIDTHS = (32, 64, 128, 256, 576)  # kWidths of paged_attention_sizes.h
SIMPLE_STEMS = ("topk_gate", "permute", "combine", "exchange", "route", "rotary_cache", "add_norm")


def _load_tiles() -> ModuleType:
    """lightmoe/kernels/tiles.py without the package around it: a build has no torch."""
    path = FOLDER.parent / "lightmoe/kernels/tiles.py"
    spec = importlib.util.spec_from_file_location("lightmoe_tiles", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_tiles = _load_tiles()
if TYPE_CHECKING:
    from lightmoe.kernels.tiles import Tile
else:
    Tile = _tiles.Tile


@dataclass(frozen=True)
class Program:
    """One compilation: the file's name, its source, the macros, and options beyond the common."""

    name: str
    stem: str
    defines: dict[str, int | str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    threads: int | None = None  # None: the kernels of the program differ
    tile: Tile | None = None
    num_bits: int | None = None  # of a weight, of a matrix stem

    @property
    def source(self) -> Path:
        """The .cu file."""
        return FOLDER / f"{self.stem}.cu"


MATRIX_BITS = {"grouped_gemm": (16,), "quant_gemm": (4, 8), "fp8_gemm": (8,)}
ROW_BITS = {"grouped_gemm": 16, "quant_gemm": 16, "fp8_gemm": 8}


def programs(architecture: int) -> list[Program]:
    """Every program of `architecture` (75 is sm_75), the first of each stem first of its kind."""
    return [
        *_matrix_programs(architecture),
        *_attention_programs(architecture),
        *_simple_programs(),
    ]


def nearest(capability: int) -> int | None:
    """The newest architecture with kernels that a card of compute capability 8.7 (87) runs."""
    generation = range(capability // 10 * 10, capability + 1)
    return max((number for number in _tiles.SHARED_BYTES if number in generation), default=None)


def tiles(stem: str, architecture: int) -> tuple[Tile, ...]:
    """The tiles that `stem` is compiled with, for any width of weight."""
    found = [
        tile
        for num_bits in MATRIX_BITS[stem]
        for tile in _tiles.candidates(architecture, num_bits, ROW_BITS[stem])
    ]
    return tuple(dict.fromkeys(found))


def _matrix_programs(architecture: int) -> Iterator[Program]:
    for stem, all_bits in MATRIX_BITS.items():
        for num_bits in all_bits:
            found = _tiles.candidates(architecture, num_bits, ROW_BITS[stem])
            instances = {tile.name: tile for tile in found}
            for tile in instances.values():
                for dtype in DTYPES:
                    if dtype == "bf16" and (architecture < 80 or tile.half_accumulate):
                        continue
                    for epilogue in EPILOGUES:
                        yield matrix_program(stem, tile, dtype, num_bits, epilogue)


def matrix_program(stem: str, tile: Tile, dtype: str, num_bits: int, epilogue: str) -> Program:
    """One instance of a matrix stem; its kernel has the program's name."""
    bits = f"_int{num_bits}" if num_bits < ROW_BITS[stem] else ""
    name = f"{stem}_{dtype}{bits}_{tile.name}_{epilogue}"
    defines: dict[str, int | str] = {
        "LIGHT_KERNEL_NAME": name,
        "LIGHT_DTYPE": DTYPES[dtype],
        "LIGHT_SWIGLU": EPILOGUES[epilogue],
        "LIGHT_NUM_BITS": num_bits,
        "LIGHT_TILE_WEIGHT_ROWS": tile.weight_rows,
        "LIGHT_TILE_TOKENS": tile.tokens,
        "LIGHT_TILE_DEPTH": tile.depth,
        "LIGHT_TILE_STAGES": tile.stages,
        "LIGHT_WARPS_WEIGHT": tile.warps_weight,
        "LIGHT_WARPS_TOKENS": tile.warps_tokens,
        "LIGHT_HALF_ACCUMULATE": tile.half_accumulate,
        "LIGHT_CTAS_PER_SM": tile.ctas_per_sm,
        "LIGHT_LIMIT": tile.limit,
        "LIGHT_DEPTH_PARTS": tile.depth_parts,
    }
    return Program(name, stem, defines, threads=tile.threads, tile=tile, num_bits=num_bits)


def _attention_programs(architecture: int) -> Iterator[Program]:
    for width in ATTENTION_WIDTHS:
        for dtype, number in DTYPES.items():
            if dtype == "f16" or architecture >= 80:
                name = f"paged_attention_{dtype}_w{width}"
                defines: dict[str, int | str] = {
                    "LIGHT_KERNEL_NAME": name,
                    "LIGHT_DTYPE": number,
                    "LIGHT_WIDTH": width,
                }
                yield Program(name, "paged_attention", defines)


def _simple_programs() -> Iterator[Program]:
    for stem in SIMPLE_STEMS:
        yield Program(stem, stem)
