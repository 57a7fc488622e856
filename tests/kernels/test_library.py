"""liblight_ops: what it is linked to and looks up, and what Python makes of its answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightmoe.errors import LightMoEError, MachineError, UsageError
from lightmoe.kernels import library, route
from tests.kernels.drivers import KERNEL, break_driver


def driver_symbols(checkout: Path) -> list[str]:
    text = (checkout / "cute_kernels/host/driver.h").read_text()
    return re.findall(r"^  X\((\w+),", text, flags=re.MULTILINE)


def test_every_driver_symbol_is_of_cuda_12_2(checkout: Path, toolchain: Path) -> None:
    header = (toolchain / "nvidia/cuda_runtime/include/cudaTypedefs.h").read_text()
    known = re.findall(r"\(CUDAAPI \*PFN_(\w+?)_v(\d+)\)", header)
    oldest: dict[str, int] = {}
    for name, version in known:
        oldest[name] = min(int(version), oldest.get(name, 1 << 30))
    symbols = driver_symbols(checkout)
    assert len(symbols) > 10
    assert {name: oldest.get(name) for name in symbols if oldest.get(name, 1 << 30) > 12020} == {}


def test_no_driver_symbol_is_looked_up_elsewhere(checkout: Path) -> None:
    sources = (checkout / "cute_kernels/host").glob("*.cpp")
    assert [path.name for path in sources if "dlsym(" in path.read_text()] == ["driver.cpp"]


def test_old_names_of_the_driver_are_not_taken(checkout: Path, toolchain: Path) -> None:
    """cuda.h renames a function whose signature changed (cuCtxCreate is cuCtxCreate_v2)."""
    header = (toolchain / "nvidia/cuda_runtime/include/cuda.h").read_text()
    renamed = set(re.findall(r"^\s*#\s*define (cu[A-Z]\w+) +cu\w+_v\d\b", header, re.MULTILINE))
    assert "cuCtxCreate" in renamed
    assert renamed.isdisjoint(driver_symbols(checkout))


DRIVER_CHECKS = """
#include <cuda.h>
#include "hopper_launch.h"
#include "host/driver.h"
namespace d = light::driver;
template <class Mine, class Theirs> constexpr bool same = sizeof(Mine) == sizeof(Theirs);
static_assert(same<d::LaunchAttribute, CUlaunchAttribute> && same<d::LaunchConfig, CUlaunchConfig>);
static_assert(offsetof(d::LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
static_assert(offsetof(d::LaunchConfig, block_x) == offsetof(CUlaunchConfig, blockDimX));
static_assert(offsetof(d::LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(d::LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(d::LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(d::LaunchConfig, num_attributes) == offsetof(CUlaunchConfig, numAttrs));
static_assert(d::kSuccess == CUDA_SUCCESS && d::kNoDevice == CUDA_ERROR_NO_DEVICE);
static_assert(d::kNoBinaryForGpu == CUDA_ERROR_NO_BINARY_FOR_GPU);
static_assert(d::kUnsupportedPtxVersion == CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
static_assert(d::kNotFound == CUDA_ERROR_NOT_FOUND);
static_assert(d::kMultiprocessorCount == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
static_assert(d::kComputeCapabilityMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(d::kComputeCapabilityMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(d::kMaxSharedMemoryPerBlockOptin ==
              CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(d::kFunctionSharedBytes == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
static_assert(d::kFunctionMaxDynamicSharedBytes == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(d::kFunctionNonPortableClusterSizeAllowed ==
              CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED);
static_assert(d::kJitErrorLogBuffer == CU_JIT_ERROR_LOG_BUFFER);
static_assert(d::kJitErrorLogBufferBytes == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES);
static_assert(d::kCaptureModeRelaxed == CU_STREAM_CAPTURE_MODE_RELAXED);
static_assert(d::kAttributeCooperative == CU_LAUNCH_ATTRIBUTE_COOPERATIVE);
static_assert(d::kAttributeClusterDimension == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
static_assert(d::kAttributeProgrammaticStreamSerialization ==
              CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
static_assert(same<light::TensorMap, CUtensorMap>);
static_assert(alignof(light::TensorMap) == alignof(CUtensorMap));
// The numbers that test_hopper_launches.py expects:
static_assert(CU_TENSOR_MAP_DATA_TYPE_UINT32 == 2 && CU_TENSOR_MAP_DATA_TYPE_FLOAT16 == 6);
static_assert(CU_TENSOR_MAP_DATA_TYPE_UINT8 == 0);
static_assert(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 == 9 && CU_TENSOR_MAP_INTERLEAVE_NONE == 0);
static_assert(CU_TENSOR_MAP_SWIZZLE_NONE == 0 && CU_TENSOR_MAP_SWIZZLE_128B == 3);
static_assert(CU_TENSOR_MAP_L2_PROMOTION_L2_256B == 3);
static_assert(CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE == 0);
"""


def test_the_driver_is_declared_as_in_cuda_h(
    checkout: Path, toolchain: Path, tmp_path: Path
) -> None:
    source = tmp_path / "checks.cpp"
    source.write_text(DRIVER_CHECKS)
    includes = [f"-I{checkout / 'cute_kernels'}", f"-I{toolchain / 'nvidia/cuda_runtime/include'}"]
    subprocess.run(["c++", "-std=c++17", "-fsyntax-only", *includes, str(source)], check=True)


def test_the_library_needs_no_cuda_library(host_library: Path) -> None:
    path = str(host_library / "liblight_ops.so")
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic.stdout)
    assert needed
    assert [name for name in needed if re.search("cuda|python|torch", name)] == []


def test_the_library_holds_no_cuda_symbol(host_library: Path) -> None:
    path = str(host_library / "liblight_ops.so")
    listed = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
    names = [line.split(maxsplit=2)[-1] for line in listed.splitlines()]
    assert any("light::driver::table" in name for name in names)
    assert [name for name in names if re.match(r"(U )?_*(cu[A-Z]|cuda)", name)] == []


def test_only_the_c_interface_is_exported(checkout: Path, host_library: Path) -> None:
    path = str(host_library / "liblight_ops.so")
    command = ["nm", "-D", "--defined-only", path]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = {line.split()[2] for line in listed.splitlines() if line.split()[1] == "T"}
    header = (checkout / "cute_kernels/light_ops.h").read_text()
    assert functions == set(re.findall(r"^LIGHT_API [\w *]*?(light_\w+)\(", header, re.MULTILINE))


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (1, MachineError, "what happened; or run the reference kernels: --device cpu"),
        (2, MachineError, "what happened; update the NVIDIA driver"),
        (3, MachineError, "what happened"),
        (4, UsageError, "what happened"),
        (5, MachineError, "what happened"),
    ],
)
def test_status_to_error(status: int, kind: type[LightMoEError], text: str) -> None:
    error = library.error_of(status, "what happened")
    assert (type(error), str(error)) == (kind, text)


def test_statuses_are_those_of_the_header(checkout: Path) -> None:
    header = (checkout / "cute_kernels/light_ops.h").read_text()
    assert re.findall(r"LIGHT_(\w+) = ([1-5]),", header.split("light_status;")[0]) == [
        ("NO_DRIVER", "1"),
        ("DRIVER_TOO_OLD", "2"),
        ("NO_KERNEL", "3"),
        ("BAD_ARGUMENT", "4"),
        ("DRIVER_ERROR", "5"),
    ]
    assert int(re.search(r"LIGHT_OPS_ABI (\d+)", header)[1]) == library.ABI
    assert int(re.search(r"LIGHT_MAX_CHUNKS (\d+)", header)[1]) == route.MAX_CHUNKS


def write_manifest(folder: Path, abi: int = library.ABI) -> None:
    architectures = {"75": [{"name": KERNEL}], "90": [{"name": KERNEL}, {"name": "combine"}]}
    (folder / "manifest.json").write_text(json.dumps({"abi": abi, "architectures": architectures}))


def test_manifest(tmp_path: Path) -> None:
    assert library.read_manifest(tmp_path) is None
    write_manifest(tmp_path)
    manifest = library.read_manifest(tmp_path)
    assert manifest.kernels == {"75": {KERNEL}, "90": {KERNEL, "combine"}}


def test_nothing_built(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"holds no kernels; build them: make kernels"):
        library.open_library(tmp_path)


def test_another_abi(tmp_path: Path) -> None:
    write_manifest(tmp_path, abi=0)
    said = f"holds kernels of ABI 0, not {library.ABI}; make kernels"
    with pytest.raises(MachineError, match=said):
        library.open_library(tmp_path)


def test_no_binding_for_this_python(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    with pytest.raises(MachineError, match=r"for this Python; build it: make kernels"):
        library.open_library(tmp_path)


def test_open_without_a_driver(host_library: Path, tmp_path: Path) -> None:
    folder, driver = tmp_path / "lib", break_driver(tmp_path / "driver")
    shutil.copytree(host_library, folder)
    write_manifest(folder)
    script = (
        "import sys, pathlib; from lightmoe.errors import MachineError\n"
        "from lightmoe.kernels.library import open_library\n"
        "try: open_library(pathlib.Path(sys.argv[1]))\n"
        "except MachineError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env=os.environ | {"LD_LIBRARY_PATH": str(driver)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("no NVIDIA driver (")
    assert done.stdout.endswith("install one; or run the reference kernels: --device cpu\n")


class Recorder:
    """A binding whose one launch takes its arguments down."""

    parameters = {"stem": ("first", "second", "last", "stream")}  # noqa: RUF012

    def __init__(self) -> None:
        self.taken: list[tuple[object, ...]] = []

    def open(self, directory: str, architecture: str) -> int:
        return 0

    def bind_device(self, index: int) -> int:
        return 0

    def stem(self, first: int, second: int, last: int = 5, stream: int = 0) -> int:
        self.taken.append((first, second, last, stream))
        return 4 if first < 0 else 0

    def last_error(self) -> str:
        return "stem: first is negative"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """On device 0, whose current stream is 7."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
    return Recorder()


def test_a_launch_takes_its_arguments_by_name_in_any_order(recorder: Recorder) -> None:
    opened = library.Library(recorder, library.Manifest(Path(), {}), None)

    opened.launch("stem", torch.device("cuda", 0), last=3, first=1, second=2)
    opened.launch("stem", torch.device("cuda", 0), second=2, first=1)

    assert recorder.taken == [(1, 2, 3, 7), (1, 2, 5, 7)]


@pytest.mark.parametrize(
    "arguments", [{"first": 1, "second": 2, "lost": 3}, {"first": 1, "lost": 3}], ids=str
)
def test_a_launch_refuses_a_name_that_it_has_not(recorder: Recorder, arguments: dict) -> None:
    opened = library.Library(recorder, library.Manifest(Path(), {}), None)

    with pytest.raises((KeyError, TypeError), match="lost|last"):
        opened.launch("stem", torch.device("cuda", 0), **arguments)

    assert recorder.taken == []


def test_a_launch_that_fails_says_why(recorder: Recorder) -> None:
    opened = library.Library(recorder, library.Manifest(Path(), {}), None)

    with pytest.raises(UsageError, match="stem: first is negative"):
        opened.launch("stem", torch.device("cuda", 0), first=-1, second=2, last=3)
