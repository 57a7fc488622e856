"""What a sweep reads: compiled tiles by their kernels' names, and the tile table of a case."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import native
import torch
from native import Groups, Launch, built_tiles
from packed import pack_codes
from problem import quantize

from lightmoe.kernels.tiles import Tile

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "grouped_gemm_bf16_w128_t128_d32_s4_2x2_swiglu",
    "grouped_gemm_bf16_w64_t8_d64_s6_4x1_swiglu",
    "grouped_gemm_bf16_w64_t8_d64_s6_4x1_plain",
    "grouped_gemm_f16_w128_t128_d32_s2_2x2_acc16_swiglu",
    "quant_gemm_bf16_int4_w64_t8_d64_s6_4x1_swiglu",
    "quant_gemm_bf16_int8_w64_t8_d64_s6_4x1_swiglu",
    "combine",
]


def test_tiles_are_those_of_stem_dtype_bits_and_epilogue() -> None:
    small, large = Tile(64, 8, 64, 6, 4, 1), Tile(128, 128, 32, 4, 2, 2)
    assert built_tiles(NAMES, "grouped_gemm", torch.bfloat16, swiglu=True) == [small, large]
    assert built_tiles(NAMES, "grouped_gemm", torch.bfloat16, swiglu=False) == [small]
    assert built_tiles(NAMES, "quant_gemm", torch.bfloat16, swiglu=True, num_bits=4) == [small]
    half = built_tiles(NAMES, "grouped_gemm", torch.float16, swiglu=True)
    assert half == [Tile(128, 128, 32, 2, 2, 2, half_accumulate=1)]
    assert str(Launch(half[0])) == "w128_t128_d32_s2_2x2_acc16"
    assert str(Launch(small, depth_splits=4)) == "w64_t8_d64_s6_4x1_k4"
    assert built_tiles(NAMES, "grouped_gemm", torch.float16, swiglu=False) == []


def test_every_compiled_matrix_kernel_is_read(checkout: Path) -> None:
    sys.path.append(str(checkout / "cute_kernels"))
    import instances

    for architecture in (75, 80, 90):
        programs = instances.programs(architecture)
        names = [program.name for program in programs if program.tile is not None]
        found = sum(
            len(built_tiles(names, stem, dtype, swiglu, num_bits))
            for stem, all_bits in instances.MATRIX_BITS.items()
            for num_bits in (0 if bits == 16 else bits for bits in all_bits)
            for dtype in (torch.float16, torch.bfloat16)
            for swiglu in (True, False)
        )
        assert found == len(names) > 0


class RecordingLibrary:
    """Takes launches down, as lightmoe.kernels.library.Library would be given them."""

    def __init__(self) -> None:
        self.launches: dict[str, dict[str, object]] = {}

    def launch(self, stem: str, _: torch.device, **arguments: object) -> None:
        self.launches[stem] = arguments


def test_launches_carry_what_the_binding_takes(checkout: Path) -> None:
    library = RecordingLibrary()
    groups = Groups.from_counts(torch.tensor([3, 5]), 8)
    launch, rows = Launch(Tile(64, 8, 64, 6, 4, 1)), torch.randn(8, 128).bfloat16()
    weights, output = torch.randn(2, 64, 128).bfloat16(), torch.empty(8, 32).bfloat16()
    packed = pack_codes(quantize(weights.clone(), 4, 128), swiglu=True)
    common = (library, launch, rows)
    native.grouped_gemm(*common, weights, groups, None, output, swiglu=True)  # type: ignore[arg-type]
    native.quant_gemm(*common, packed, groups, None, output)  # type: ignore[arg-type]
    binding = (checkout / "cute_kernels" / "binding.cpp").read_text()
    for stem, arguments in library.launches.items():
        taken = re.search(rf'def\("{stem}", .*?\);', binding, re.DOTALL)
        assert taken is not None
        assert set(re.findall(r'arg\("(\w+)"\)', taken[0])) == {*arguments, "stream"}
    plain, quantised = library.launches["grouped_gemm"], library.launches["quant_gemm"]
    assert plain["slot_bytes"] == 64 * 128 * 2
    assert quantised["slot_bytes"] == 64 * 128 // 2 + 64 * 2
    assert plain["num_features"] == quantised["num_features"] == 32
    assert plain["depth"] == quantised["depth"] == 128
    assert plain["tile"] == (64, 8, 64, 6, 4, 1, 0)


def test_tile_table_covers_every_pair_once() -> None:
    counts = torch.tensor([0, 5, 16, 1, 0, 40])
    groups = Groups.from_counts(counts, 16)
    assert groups.num_pairs == 62
    assert groups.offsets.tolist() == [0, 0, 5, 21, 22, 22, 62]
    assert groups.tile_offsets.tolist() == [0, 0, 1, 2, 3, 3, 6]
    assert groups.tile_groups.tolist() == [1, 2, 3, 5, 5, 5]
    assert groups.argument[4:] == (6, 62)
