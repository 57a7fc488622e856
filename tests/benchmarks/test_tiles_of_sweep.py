"""What a sweep reads: compiled tiles by their kernels' names, and the tile table of a case."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import native
import torch
from native import Groups, Launch, built_tiles
from packed import pack_codes
from problem import quantize

from lightmoe.kernels.tiles import candidates

ROOT = Path(__file__).resolve().parents[2]
LARGE, SMALL = (candidates(80, 16)[index] for index in (0, -1))
HALF = next(tile for tile in candidates(75, 16) if tile.half_accumulate)
CODES = candidates(80, 4)[0]
NAMES = [
    f"grouped_gemm_bf16_{SMALL.name}_swiglu",
    f"grouped_gemm_bf16_{LARGE.name}_swiglu",
    f"grouped_gemm_bf16_{SMALL.name}_plain",
    f"grouped_gemm_f16_{HALF.name}_swiglu",
    f"quant_gemm_bf16_int4_{CODES.name}_swiglu",
    f"quant_gemm_bf16_int8_{candidates(80, 8)[0].name}_swiglu",
    "combine",
]


def test_tiles_are_those_of_stem_dtype_bits_and_epilogue() -> None:
    ampere, stem = ("80", NAMES), "grouped_gemm"
    assert built_tiles(*ampere, stem, torch.bfloat16, swiglu=True) == [LARGE, SMALL]
    assert built_tiles(*ampere, stem, torch.bfloat16, swiglu=False) == [SMALL]
    assert built_tiles(*ampere, "quant_gemm", torch.bfloat16, swiglu=True, num_bits=4) == [CODES]
    assert built_tiles("80ptx", NAMES, stem, torch.bfloat16, swiglu=False) == [SMALL]
    assert built_tiles("75ptx", NAMES, stem, torch.float16, swiglu=True) == [HALF]
    assert built_tiles(*ampere, stem, torch.float16, swiglu=False) == []
    assert str(Launch(HALF)) == "w128_t64_d32_s2_2x2_acc16"
    assert str(Launch(SMALL, depth_splits=4)) == "w64_t8_d64_s6_4x1_k4"


def test_tiles_of_one_instance_are_told_apart() -> None:
    tile = candidates(90, 4)[0]
    smaller = replace(tile, tokens=16, stages=2)
    names = [f"quant_gemm_bf16_int4_{tile.name}_plain"]
    with mock.patch.object(native, "candidates", return_value=(tile, smaller)):
        built = built_tiles("90", names, "quant_gemm", torch.bfloat16, swiglu=False, num_bits=4)
    assert built == [tile, smaller]
    assert str(Launch(smaller)) == f"{tile.name}_t16_s2"
    assert str(Launch(tile)) == f"{tile.name}_t{tile.tokens}_s{tile.stages}"


def test_every_compiled_matrix_kernel_is_read(checkout: Path) -> None:
    sys.path.append(str(checkout / "cute_kernels"))
    import instances

    for architecture in (75, 80, 90):
        names = [
            program.name
            for program in instances.programs(architecture)
            if program.tile is not None and program.tile.row_bits == 16  # no sweep in e4m3
        ]
        read = [
            f"{stem}_{native.DTYPE_NAMES[dtype]}{bits}_{tile.name}_{epilogue}"
            for stem, all_bits in instances.MATRIX_BITS.items()
            if instances.ROW_BITS[stem] == 16
            for num_bits in all_bits
            for bits in ["" if num_bits == 16 else f"_int{num_bits}"]
            for dtype in (torch.float16, torch.bfloat16)
            for epilogue in ("plain", "swiglu")
            for tile in built_tiles(
                str(architecture),
                names,
                stem,
                dtype,
                swiglu=epilogue == "swiglu",
                num_bits=num_bits,
            )
        ]
        assert set(read) == set(names)
        assert len(names) > 0


class RecordingLibrary:
    """Takes launches down, as lightmoe.kernels.library.Library would be given them."""

    def __init__(self) -> None:
        self.launches: dict[str, dict[str, object]] = {}

    def launch(self, stem: str, _: torch.device, **arguments: object) -> None:
        self.launches[stem] = arguments


def test_launches_carry_what_the_binding_takes(checkout: Path) -> None:
    library = RecordingLibrary()
    groups = Groups.from_counts(torch.tensor([3, 5]), 8)
    launch, rows = Launch(SMALL), torch.randn(8, 128).bfloat16()
    weights, output = torch.randn(2, 64, 128).bfloat16(), torch.empty(8, 32).bfloat16()
    packed = pack_codes(quantize(weights.clone(), 4, 128), swiglu=True)
    common = (library, launch, rows)
    native.grouped_gemm(*common, weights, groups, None, output, swiglu=True)  # type: ignore[arg-type]
    native.quant_gemm(*common, packed, groups, None, output)  # type: ignore[arg-type]
    binding = (checkout / "cute_kernels" / "binding.cpp").read_text()
    for stem, arguments in library.launches.items():
        taken = re.search(rf'define\(module, "{stem}", .*?\);', binding, re.DOTALL)
        assert taken is not None
        required = re.findall(r'arg\("(\w+)"\)(?! = 0)', taken[0])
        assert {*required, "stream"} <= {*arguments, "stream"}
        assert {*arguments} <= {*re.findall(r'arg\("(\w+)"\)', taken[0])}
    plain, quantised = library.launches["grouped_gemm"], library.launches["quant_gemm"]
    assert plain["slot_bytes"] == 64 * 128 * 2
    assert quantised["slot_bytes"] == 64 * 128 // 2 + 64 * 2
    assert plain["num_features"] == quantised["num_features"] == 32
    assert plain["depth"] == quantised["depth"] == 128
    assert plain["tile"] == (64, 8, 64, 6, 4, 1, 0, 0, 1)


def test_tile_table_covers_every_pair_once() -> None:
    counts = torch.tensor([0, 5, 16, 1, 0, 40])
    groups = Groups.from_counts(counts, 16)
    assert groups.num_pairs == 62
    assert groups.offsets.tolist() == [0, 0, 5, 21, 22, 22, 62]
    assert groups.tile_offsets.tolist() == [0, 0, 1, 2, 3, 3, 6]
    assert groups.tile_groups.tolist() == [1, 2, 3, 5, 5, 5]
    assert groups.argument[4:] == (6, 62)
