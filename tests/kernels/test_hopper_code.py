"""What the compiler makes of the tiles of Hopper's warpgroups, without a GPU: tensor cores fed by
the copy engine, nothing in local memory, registers that move between the roles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

from lightmoe.kernels.tiles import Tile, candidates
from tests.kernels.builds import build, compiles, machine_code, run_build

REGISTERS = 65536  # of a multiprocessor
WIDTHS = [8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176]
PROGRAMS = {
    f"{stem}_{tile.name}_swiglu": tile
    for num_bits, row_bits, stem in (
        (16, 16, "grouped_gemm_bf16"),
        (8, 16, "quant_gemm_bf16_int8"),
        (4, 16, "quant_gemm_bf16_int4"),
        (8, 8, "fp8_gemm_bf16"),
    )
    for tile in candidates(90, num_bits, row_bits)
}
MUST_HAVE = {"UTMALDG", "LDGSTS", "STSM", "USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"}
MUST_NOT_HAVE = {"LDL", "STL", "HMMA"}
SERIALIZED = """
extern "C" __global__ void serialized(float *out, unsigned long long a, unsigned long long b) {
  float s[4] = {};
  for (int i = 0; i < 2; ++i) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"
                 " {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]) : "l"(a), "l"(b));
    s[0] += 1;
  }
  out[threadIdx.x] = s[0] + s[1] + s[2] + s[3];
}
"""


@pytest.fixture(scope="session")
def folder(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An instance of every kind of tile, with SwiGLU."""
    out = tmp_path_factory.mktemp("hopper")
    entries = build(checkout, out, "--arch", "90", "--instances", f"^({'|'.join(PROGRAMS)})$")
    assert {entry["name"] for entry in entries["90"]} == set(PROGRAMS)
    return out


@compiles
def test_nothing_spills_and_registers_are_all_that_a_thread_may_have(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["architectures"]["90"]:
        tile = PROGRAMS[entry["name"]]
        assert (entry["spill_bytes"], entry["local_bytes"]) == (0, 0), entry["name"]
        assert entry["threads"] == tile.threads
        # What the roles give and take is reckoned from this number.
        assert entry["registers"] == registers_at_launch(tile), entry["name"]


def registers_at_launch(tile: Tile) -> int:
    return REGISTERS // tile.ctas_per_sm // tile.threads // 8 * 8


@compiles
def test_the_tensor_cores_are_fed_by_the_copy_engine(
    checkout: Path, module: Callable[[str], ModuleType], folder: Path
) -> None:
    for name, code in machine_code(checkout, module("toolchain"), folder / "90").items():
        found = set(re.findall(r"\b(USETMAXREG\.[A-Z_]+|[A-Z]+)\b", code))
        assert found >= MUST_HAVE, (name, MUST_HAVE - found)
        assert found.isdisjoint(MUST_NOT_HAVE), (name, MUST_NOT_HAVE & found)
        instruction = r"\bHGMMA\.64x(\d+)x16\.F32\.BF16\b"
        if PROGRAMS[name].row_bits == 8:
            instruction = r"\bQGMMA\.64x(\d+)x32\.F32\.E4M3\.E4M3\b"
            assert "HGMMA" not in found, name
        widths = {int(width) for width in re.findall(instruction, code)}
        assert sorted(widths) == [width for width in WIDTHS if width <= PROGRAMS[name].limit]


@compiles
def test_the_roles_share_the_registers_that_there_are(
    checkout: Path, module: Callable[[str], ModuleType], folder: Path
) -> None:
    for name, code in machine_code(checkout, module("toolchain"), folder / "90").items():
        (given,) = re.findall(r"USETMAXREG\.DEALLOC\.CTAPOOL (0x[0-9a-f]+)", code)
        (taken,) = re.findall(r"USETMAXREG\.TRY_ALLOC\.CTAPOOL \w+, (0x[0-9a-f]+)", code)
        producer, consumer, tile = int(given, 16), int(taken, 16), PROGRAMS[name]
        num_consumers = tile.threads // 128 - 1
        each = registers_at_launch(tile)
        assert producer < each < consumer <= 240, name
        assert producer + num_consumers * consumer <= (1 + num_consumers) * each, name


def test_hopper_is_compiled_for_its_own_instructions(module: Callable[[str], ModuleType]) -> None:
    architecture = module("build").Architecture
    options = {name: architecture.parse(name).option for name in ("80", "90", "80ptx", "90ptx")}
    assert options == {
        "80": "--gpu-architecture=sm_80",
        "90": "--gpu-architecture=sm_90a",
        "80ptx": "--gpu-architecture=compute_80",
        "90ptx": "--gpu-architecture=compute_90a",
    }


def test_tiles_of_one_instance_are_one_program(module: Callable[[str], ModuleType]) -> None:
    instances = module("instances")
    tile, *others = instances._tiles.candidates(90, 16)
    smaller = replace(tile, tokens=tile.tokens - 16, stages=2)
    assert smaller.name == tile.name

    with mock.patch.object(instances._tiles, "candidates", return_value=(tile, smaller, *others)):
        both = [program.name for program in instances.programs(90)]

    assert sum(tile.name in name for name in both if name.startswith("grouped_gemm")) == 4
    assert len(set(both)) == len(both)


def test_an_instance_is_given_no_tokens_or_stages_of_a_tile(checkout: Path) -> None:
    """They are the launch's: device code that read these macros would serve one tile only."""
    text = "".join(path.read_text() for path in (checkout / "cute_kernels").glob("hopper_*"))
    assert "LIGHT_TILE" not in text
    for stem in ("grouped_gemm", "quant_gemm", "fp8_gemm"):
        source = (checkout / f"cute_kernels/{stem}.cu").read_text()
        (tile,) = re.findall(r"light::HopperTile<[^;]*>;", source)
        assert set(re.findall(r"LIGHT_\w+", tile)).isdisjoint(
            {"LIGHT_TILE_TOKENS", "LIGHT_TILE_STAGES"}
        )


def test_mma_that_wait_for_each_other_are_refused(
    checkout: Path, module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    nvrtc, tools = module("nvrtc"), module("toolchain").find(checkout / "build/toolchain")
    source = tmp_path / "serialized.cu"
    source.write_text(SERIALIZED)
    options = ["--gpu-architecture=sm_90a", "--ptxas-options=-v"]
    with pytest.raises(nvrtc.CompileError, match=r"serialized.cu waits for every wgmma"):
        nvrtc.compile_program(tools.nvrtc(90), source, options, as_ptx=False)


@compiles
def test_the_ptx_of_ampere_is_for_hopper_too(checkout: Path, tmp_path: Path) -> None:
    pattern = f"^grouped_gemm_bf16_{candidates(80, 16)[-1].name}_plain$"
    done = run_build(
        checkout, "--kernels-only", "--out", tmp_path, "--arch", "80ptx", "--instances", pattern
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "80ptx").glob("*.ptx")
    text = path.read_text()
    assert ".target sm_80" in text
    assert "mma.sync.aligned.m16n8k16" in text
    assert "wgmma" not in text
