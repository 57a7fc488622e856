"""The build of the kernels, without a GPU: every stem compiles for every architecture with the
compiler of CUDA 12.2, and what it makes for Turing holds what was promised.
"""

from __future__ import annotations

import json
import locale
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernels.builds import build, compiles, machine_code, run_build

ARCHITECTURES = ("75", "80", "86", "89", "90")
TURING_REGISTERS = 65536  # of a multiprocessor
TURING_SHARED_BYTES = 65536
MATRIX_STEMS = ("grouped_gemm", "quant_gemm")

PTXAS_LOG = """ptxas info    : 304 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_75'
ptxas info    : Function properties for first
ptxas         .     24 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, 128 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_75'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers
"""


@pytest.fixture(scope="session")
def one_per_stem(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The first instance of every stem, for every architecture."""
    out = tmp_path_factory.mktemp("one-per-stem")
    return build(checkout, out, "--one-per-stem", "--arch", ",".join(ARCHITECTURES))


@pytest.fixture(scope="session")
def turing_folder(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every instance of the matrix stems for sm_75."""
    out = tmp_path_factory.mktemp("turing")
    build(checkout, out, "--arch", "75", "--instances", f"^({'|'.join(MATRIX_STEMS)})_")
    return out


def turing_entries(folder: Path) -> list[dict]:
    return json.loads((folder / "manifest.json").read_text())["architectures"]["75"]


@compiles
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_stem_compiles(
    checkout: Path, one_per_stem: dict[str, list[dict]], architecture: str
) -> None:
    stems = {path.stem for path in (checkout / "cute_kernels").glob("*.cu")}
    if architecture != "90":
        stems -= {"fp8_gemm"}  # older tensor cores have no e4m3
    assert {entry["stem"] for entry in one_per_stem[architecture]} == stems


@compiles
def test_turing_instances_spill_nothing(turing_folder: Path) -> None:
    entries = turing_entries(turing_folder)
    assert {entry["stem"] for entry in entries} == set(MATRIX_STEMS)
    wasteful = [entry for entry in entries if entry["spill_bytes"] or entry["local_bytes"]]
    assert [(e["name"], e["spill_bytes"], e["local_bytes"]) for e in wasteful] == []


@compiles
def test_turing_instances_use_the_tensor_cores(checkout: Path, turing_folder: Path, module) -> None:
    wrong = {}
    for name, code in machine_code(checkout, module("toolchain"), turing_folder / "75").items():
        found = set(re.findall(r"\b(HMMA\.1688|LDSM|LDL|STL)\b", code))
        if found != {"HMMA.1688", "LDSM"}:
            wrong[name] = found
    assert wrong == {}


@compiles
def test_turing_instances_fit_as_often_as_they_say(
    checkout: Path, turing_folder: Path, module, tmp_path: Path
) -> None:
    instances = module("instances")
    programs = {program.name: program for program in instances.programs(75)}
    shared_bytes = shared_bytes_calculator(checkout, tmp_path)
    too_large = {}
    for entry in turing_entries(turing_folder):
        program = programs[entry["name"]]
        num_ctas = program.tile.ctas_per_sm
        registers = -(-entry["registers"] // 8) * 8 * entry["threads"]
        shared = entry["shared_bytes"] + shared_bytes(program.tile, program.num_bits)
        if registers * num_ctas > TURING_REGISTERS or shared * num_ctas > TURING_SHARED_BYTES:
            too_large[program.name] = (num_ctas, registers, shared)
    assert too_large == {}
    assert {program.tile.ctas_per_sm for program in programs.values() if program.tile} >= {2}


def shared_bytes_calculator(checkout: Path, folder: Path) -> Callable[[object, int], int]:
    """tile_shared_bytes of tile_memory.h, the formula that host and device share."""
    source, program = folder / "shared.cpp", folder / "shared"
    source.write_text(
        "#include <cstdio>\n#include <cstdlib>\n"
        '#include "tile_memory.h"\n'
        "int main(int, char **v) {\n"
        "  light_tile tile{};\n"
        "  tile.weight_rows = atoi(v[1]), tile.tokens = atoi(v[2]), tile.depth = atoi(v[3]);\n"
        "  tile.stages = atoi(v[4]);\n"
        '  std::printf("%d", light::tile_shared_bytes(tile, atoi(v[5])));\n'
        "}\n"
    )
    include = f"-I{checkout / 'cute_kernels'}"
    subprocess.run(["c++", "-std=c++17", include, str(source), "-o", str(program)], check=True)

    def shared_bytes(tile: object, num_bits: int) -> int:
        sizes = (tile.weight_rows, tile.tokens, tile.depth, tile.stages, num_bits)
        done = subprocess.run(
            [str(program), *map(str, sizes)], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    return shared_bytes


@compiles
def test_ptx_for_newer_cards(checkout: Path, tmp_path: Path) -> None:
    pattern = "^(grouped_gemm|combine)"
    built = build(checkout, tmp_path, "--arch", "75ptx", "--instances", pattern, "--one-per-stem")
    (product,) = [entry for entry in built["75ptx"] if entry["stem"] == "grouped_gemm"]
    text = (tmp_path / "75ptx" / f"{product['program']}.ptx").read_text()
    assert ".target sm_75" in text
    assert f".entry {product['name']}(" in text
    assert "mma.sync.aligned.m16n8k8" in text


@compiles
def test_what_did_not_change_is_not_compiled_again(checkout: Path, tmp_path: Path) -> None:
    arguments = ["--kernels-only", "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    arguments += ["--arch", "75", "--instances", "^combine"]
    first, second = run_build(checkout, *arguments), run_build(checkout, *arguments)
    assert "combine for 75" in first.stdout
    assert "compiled 1 programs" in first.stdout
    assert "compiled" not in second.stdout
    assert second.returncode == 0
    both = run_build(checkout, *arguments[:-3], "80", *arguments[-2:])
    assert "combine for 80" in both.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["80", "manifest.json"]


def test_a_changed_header_or_option_is_another_job(module, tmp_path: Path) -> None:
    builder, instances = module("build"), module("instances")
    source, header = tmp_path / "stem.cu", tmp_path / "inner.cuh"
    source.write_text('#include "outer.h"\n#include <cuda_fp16.h>\n')
    (tmp_path / "outer.h").write_text('  #  include "inner.cuh"\n')
    header.write_text("// one\n")
    assert set(builder.sources(source)) == {source, tmp_path / "outer.h", header}

    class Local(instances.Program):
        source = tmp_path / "stem.cu"

    tools = module("toolchain").Toolchain(tmp_path)
    turing = builder.Architecture.parse("75")

    def cached(**changes: object) -> Path:
        program = Local("stem", "stem", **changes)
        return builder.make_job(program, turing, tools, tmp_path).cached

    before = cached()
    assert cached() == before
    assert cached(defines={"LIGHT_DTYPE": 1}) != before
    assert cached(options=("--maxrregcount=128",)) != before
    header.write_text("// two\n")
    assert cached() != before


def test_a_kernel_that_does_not_compile(module, checkout: Path, tmp_path: Path) -> None:
    nvrtc = module("nvrtc")
    tools = module("toolchain").find(checkout / "build/toolchain")
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void wrong() { undeclared(); }\n")
    encoding = locale.getencoding()
    with pytest.raises(nvrtc.CompileError, match=r"(?s)wrong.cu does not compile.*undeclared"):
        nvrtc.compile_program(tools.nvrtc(75), source, ["--gpu-architecture=sm_75"], as_ptx=False)
    assert locale.getencoding() == encoding, "NVRTC changes the locale of the thread"


def test_what_ptxas_says(module) -> None:
    nvrtc = module("nvrtc")
    first = nvrtc.Usage("first", registers=255, spill_bytes=28, local_bytes=24, shared_bytes=128)
    second = nvrtc.Usage("second", registers=10, spill_bytes=0, local_bytes=0, shared_bytes=0)
    assert nvrtc.parse_usages(PTXAS_LOG) == (first, second)
    with pytest.raises(nvrtc.CompileError, match="ptxas says nothing of second's registers"):
        nvrtc.parse_usages(PTXAS_LOG.replace("Used 10", "Took 10"))


@pytest.mark.parametrize("text", ["", "sm_75", "7.5", "75ptx2", "ptx"])
def test_an_unknown_architecture(checkout: Path, text: str) -> None:
    done = run_build(checkout, "--arch", text)
    assert done.returncode == 1
    assert done.stderr == (
        f"build.py: architecture {text!r} is unknown; give such as 75, 90 or 75ptx\n"
    )


def test_native_takes_the_cards_that_are_here(
    module, monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builder = module("build")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '7.5\\n7.5\\n12.0\\n8.7\\n9.0\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    names = [architecture.folder for architecture in builder.parse_architectures("native,75ptx")]
    assert names == ["75", "86", "90", "75ptx"]  # 8.7 runs the code of sm_86
    assert capsys.readouterr().out == "no kernels for cards of compute capability 12.0: left out\n"
    tool.write_text("#!/bin/sh\necho 'no devices were found'; exit 6\n")
    with pytest.raises(ValueError, match="no NVIDIA card here; say what to build for: --arch"):
        builder.parse_architectures("native")


def test_no_compiler_for_the_library(checkout: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run_build(checkout, "--host-only", "--out", tmp_path)
    assert done.returncode == 1
    assert "no C++ compiler 'no-such-compiler'; install one" in done.stderr


@pytest.mark.parametrize("architecture", [int(name) for name in ARCHITECTURES])
def test_the_instances_of_an_architecture(module, architecture: int) -> None:
    programs = module("instances").programs(architecture)
    names = [program.name for program in programs]
    assert len(set(names)) == len(names)
    assert all(program.source.is_file() for program in programs)
    bfloat16 = [name for name in names if "_bf16" in name]
    assert bool(bfloat16) == (architecture >= 80), "Turing has no bf16 tensor cores"
    assert not [name for name in bfloat16 if "acc16" in name]


def test_an_instance_name_is_that_of_the_host(module) -> None:
    """host/matrix.cpp makes the same name; test_library.py launches this one."""
    instances = module("instances")
    tile = instances.Tile(128, 64, 32, 2, 2, 2)
    program = instances.matrix_program("grouped_gemm", tile, "f16", 16, "plain")
    assert program.name == "grouped_gemm_f16_w128_t64_d32_s2_2x2_plain"
    half = instances.Tile(64, 8, 64, 6, 4, 1, half_accumulate=1)
    program = instances.matrix_program("quant_gemm", half, "f16", 4, "swiglu")
    assert program.name == "quant_gemm_f16_int4_w64_t8_d64_s6_4x1_acc16_swiglu"
