"""What liblight_ops asks of a driver and what it refuses, over a driver that tells (drivers.py).

That the kernels compute the right thing on a real one is for the tests marked `gpu`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightmoe.kernels import library
from tests.kernels.drivers import (
    BIND,
    KERNEL,
    PRODUCT,
    TILE,
    break_driver,
    call,
    compile_driver,
    launches,
    opened,
    product,
)

FOLDERS = ["75", "80", "90", "75ptx", "80ptx"]
SPLIT = {"split_sums": 16, "split_tickets": 16, "depth_splits": 3}


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A folder of files that pretend to be a kernel for each of FOLDERS."""
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        suffix = ".ptx" if folder.endswith("ptx") else ".cubin"
        (tmp_path / folder / f"{KERNEL}{suffix}").write_text(f"image of {folder}")
    return tmp_path


# Without a driver, or with one that does not do


def test_no_driver(host_library: Path, kernels: Path, tmp_path: Path) -> None:
    driver = break_driver(tmp_path / "driver")
    lines = call(host_library, driver, opened(kernels), ("driver_version", [], {}))
    assert re.match(r"open: 1 no NVIDIA driver \(.*libcuda.so.1.*\): install one", lines[0])
    assert lines[1] == "driver_version: 0"


def test_a_driver_that_lacks_a_symbol(host_library: Path, kernels: Path, tmp_path: Path) -> None:
    source = tmp_path / "empty.cpp"
    source.write_text('extern "C" int cuInit(unsigned int) { return 0; }\n')
    driver = tmp_path / "driver"
    driver.mkdir()
    (line,) = call(host_library, compile_driver(driver, source), opened(kernels))
    assert line == (
        "open: 1 libcuda.so.1 lacks cuDriverGetVersion: install a driver of CUDA 12 (525) or later"
    )


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"FAKE_DRIVER": 12000}, "open: 0"),
        (
            {"FAKE_DRIVER": 11080},
            "open: 2 the driver ends at CUDA 11.8: install 525 or later",
        ),
        (
            {"FAKE_INIT": 100},
            "open: 1 cuInit: CUDA_ERROR_OF_THE_FAKE (100): as the test wanted",
        ),
        (
            {"FAKE_INIT": 999},
            "open: 5 cuInit: CUDA_ERROR_OF_THE_FAKE (999): as the test wanted",
        ),
    ],
)
def test_open(
    host_library: Path, fake_driver: Path, kernels: Path, environment: dict, line: str
) -> None:
    assert call(host_library, fake_driver, opened(kernels), **environment) == [line]


def test_open_without_a_folder(host_library: Path, fake_driver: Path, tmp_path: Path) -> None:
    (line,) = call(host_library, fake_driver, opened(tmp_path / "none"))
    assert line == f"open: 4 no directory {tmp_path / 'none'}"


def test_calls_before_open(host_library: Path, fake_driver: Path) -> None:
    lines = call(host_library, fake_driver, BIND, product())
    assert lines == [
        "bind_device: 4 not open: call light_open first",
        "grouped_gemm: 4 not open: call light_open first",
    ]


# Which kernels a device gets


@pytest.mark.parametrize(
    ("capability", "architecture", "folder"),
    [
        (75, "", "75"),
        (80, "", "80"),
        (86, "", "80"),
        (89, "", "80"),
        (90, "", "90"),
        (90, "75ptx", "75ptx"),
        (90, "80ptx", "80ptx"),
    ],
)
def test_kernels_of_a_device(
    host_library: Path,
    fake_driver: Path,
    kernels: Path,
    capability: int,
    architecture: str,
    folder: str,
) -> None:
    calls = (opened(kernels, architecture), BIND, ("architecture", [], {}), product())
    lines = call(host_library, fake_driver, *calls, FAKE_CAPABILITY=capability)
    assert f"architecture: {folder}" in lines
    assert f"load image of {folder}" in lines
    if not architecture:
        assert library.architecture_for(capability, FOLDERS) == folder


@pytest.mark.parametrize("capability", [70, 100, 120])
def test_a_device_without_kernels(
    host_library: Path, fake_driver: Path, kernels: Path, capability: int
) -> None:
    calls = (opened(kernels), BIND, product())
    lines = call(host_library, fake_driver, *calls, FAKE_CAPABILITY=capability)
    assert lines[-1] == (
        f"grouped_gemm: 3 {kernels} holds no kernels for sm_{capability}: "
        f"make kernels ARCHS={capability}"
    )
    assert library.architecture_for(capability, FOLDERS) is None


def test_opening_again_changes_the_kernels(
    host_library: Path, fake_driver: Path, kernels: Path
) -> None:
    calls = [opened(kernels), BIND, product(), opened(kernels, "75ptx"), product()]
    calls += [opened(kernels), product()]
    lines = call(host_library, fake_driver, *calls, FAKE_CAPABILITY=90)
    assert [line for line in lines if line.startswith("load")] == [
        "load image of 90",
        "load image of 75ptx",
    ]
    assert len(launches(lines)) == 3


def test_an_instance_that_was_not_built(
    host_library: Path, fake_driver: Path, kernels: Path
) -> None:
    lines = call(host_library, fake_driver, opened(kernels), BIND, product(swiglu=True))
    name = KERNEL.replace("plain", "swiglu")
    assert lines[-1] == (
        f"grouped_gemm: 3 no file {kernels}/75/{name}.cubin: that kernel was not built: "
        "make kernels"
    )


@pytest.mark.parametrize(("error", "status"), [(222, 2), (209, 3), (500, 3), (200, 5)], ids=str)
def test_a_driver_that_refuses_a_kernel(
    host_library: Path, fake_driver: Path, kernels: Path, error: int, status: int
) -> None:
    path = kernels / "75" / f"{KERNEL}.cubin"
    path.write_text(f"{error} is what loading it gives")
    lines = call(host_library, fake_driver, opened(kernels), BIND, product())
    assert lines[-1] == (
        f"grouped_gemm: {status} loading {path}: CUDA_ERROR_OF_THE_FAKE ({error}): "
        "as the test wanted"
    )


# How it launches


def test_a_launch(host_library: Path, fake_driver: Path, kernels: Path) -> None:
    lines = call(host_library, fake_driver, opened(kernels), BIND, product())
    # 68 multiprocessors hold 4 CTAs of 128 threads each; there are more units of work than that:
    # up to (1000 + 8 * 63) / 64 = 23 tiles of tokens, times 512 / 128 blocks of weights = 92.
    assert launches(lines) == [
        f"launch {KERNEL} grid 92 block 128 shared 25600 stream 7 attributes"
    ]


@pytest.mark.parametrize(
    ("changes", "num_ctas"),
    [
        ({"max_ctas": 16}, 16),
        ({"max_ctas": 1000}, 92),
        ({"num_features": 4096}, 272),
        ({"num_features": 4096, "max_ctas": 270}, 270),
        ({"num_features": 8}, 23),
        ({"groups": (0, 0, 0, 0, 0, 1000)}, 64),
        ({"groups": (0, 16, 16, 16, 8, 1)}, 4),
        ({"groups": (0, 16, 16, 16, 8, 3)}, 12),
        ({"groups": (0, 16, 16, 16, 8, 3)} | SPLIT, 36),
    ],
    ids=str,
)
def test_the_persistent_grid(
    host_library: Path, fake_driver: Path, kernels: Path, changes: dict, num_ctas: int
) -> None:
    lines = call(host_library, fake_driver, opened(kernels), BIND, product(**changes))
    assert f" grid {num_ctas} " in launches(lines)[0]


def test_nothing_to_compute_launches_nothing(
    host_library: Path, fake_driver: Path, kernels: Path
) -> None:
    empty = product(groups=(0, 16, 16, 16, 8, 0), rows=0, output=0)
    lines = call(host_library, fake_driver, opened(kernels), BIND, empty)
    assert lines[-1] == "grouped_gemm: 0"
    assert launches(lines) == []


@pytest.mark.parametrize(
    ("capability", "architecture", "attributes"),
    [(75, "", ""), (86, "", ""), (90, "", " 6"), (90, "75ptx", ""), (90, "80ptx", "")],
)
def test_overlapped_launch_where_kernels_can_wait(
    host_library: Path,
    fake_driver: Path,
    kernels: Path,
    capability: int,
    architecture: str,
    attributes: str,
) -> None:
    calls = [opened(kernels, architecture), BIND, product()]
    calls += [("set_overlapped_launch", [0], {}), product()]
    lines = launches(call(host_library, fake_driver, *calls, FAKE_CAPABILITY=capability))
    assert lines[0].endswith(f"attributes{attributes}")
    assert lines[1].endswith("attributes")


def test_more_than_48_kib_of_shared_memory_is_asked_for(
    host_library: Path, fake_driver: Path, kernels: Path
) -> None:
    for stages in (3, 5, 6):
        name = KERNEL.replace("_s2_", f"_s{stages}_")
        (kernels / "75" / f"{name}.cubin").write_text("image")
    calls = [product(tile=(*TILE[:3], stages, *TILE[4:])) for stages in (3, 5, 6)]
    lines = call(host_library, fake_driver, opened(kernels), BIND, *calls)
    assert [line for line in lines if line.startswith("set")] == ["set 8 65536"]
    assert len(launches(lines)) == 2
    assert lines[-1].endswith(
        "_s6_2x2_plain needs 74752 bytes of shared memory, a CTA here has 65536"
    )


def test_a_launch_that_fails(host_library: Path, fake_driver: Path, kernels: Path) -> None:
    calls = (opened(kernels), BIND, product())
    lines = call(host_library, fake_driver, *calls, FAKE_LAUNCH=701)
    assert lines[-1] == (
        f"grouped_gemm: 5 {KERNEL}: CUDA_ERROR_OF_THE_FAKE (701): as the test wanted"
    )


def test_a_thread_without_a_context(host_library: Path, fake_driver: Path, kernels: Path) -> None:
    lines = call(host_library, fake_driver, opened(kernels), product(), ("bind_device", [2], {}))
    assert lines[1:] == [
        "grouped_gemm: 5 this thread has no current CUDA context",
        "bind_device: 5 cuDeviceGet: CUDA_ERROR_OF_THE_FAKE (101): as the test wanted",
    ]


def test_each_context_loads_a_kernel_once(
    host_library: Path, fake_driver: Path, kernels: Path
) -> None:
    calls = [opened(kernels), ("in threads", [16, PRODUCT], {})]
    lines = call(host_library, fake_driver, *calls)
    assert lines[-1] == "in threads: [0]"
    assert len(launches(lines)) == 16
    assert lines.count("load image of 75") == 1


def test_loading_is_allowed_in_a_capture(
    host_library: Path, fake_driver: Path, kernels: Path
) -> None:
    lines = call(host_library, fake_driver, opened(kernels), BIND, product())
    modes = [line for line in lines if line.startswith("capture mode")]
    assert modes == ["capture mode 2", "capture mode 0"]  # relaxed, then what it was before
    assert lines.index("capture mode 2") < lines.index("load image of 75")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": 2}, "dtype 2 is neither fp16 nor bf16"),
        ({"depth": 12}, "depth 12 and 512 features must be multiples of 8"),
        ({"num_features": 0}, "depth 256 and 0 features must be multiples of 8"),
        ({"rows": 0}, "rows or weights is null, or output and output_rows both"),
        ({"groups": (0, 16, 0, 0, 8, 9)}, "groups without a table of tiles"),
        ({"groups": (0, 16, 16, 16, 8, -1)}, "-1 pairs in 8 groups"),
        ({"tile": (*TILE[:4], 0, *TILE[5:])}, "no such tile as grouped_gemm_f16_w128_t64_d32_s2"),
        ({"tile": (*TILE[:8], 0)}, "no such tile as grouped_gemm_f16_w128_t64_d32_s2"),
        ({"tile": (*TILE[:6], 1, 0, 1), "dtype": 1}, "fp16 accumulators take fp16 rows only"),
        ({"swiglu": True, "output_float32": True}, "swiglu has no float32 output"),
        ({"depth_splits": 0}, "0 splits of a depth of 8 stages"),
        (SPLIT | {"depth_splits": 9}, "9 splits of a depth of 8 stages"),
        (SPLIT | {"depth_splits": 5}, "5 splits of a depth of 8 stages"),  # 2, 2, 2, 2 and none
        (SPLIT | {"split_sums": 0}, "3 splits without split_sums or split_tickets"),
        (SPLIT | {"split_tickets": 0}, "3 splits without split_sums or split_tickets"),
    ],
    ids=str,
)
def test_bad_arguments(
    host_library: Path, fake_driver: Path, kernels: Path, changes: dict, text: str
) -> None:
    lines = call(host_library, fake_driver, opened(kernels), BIND, product(**changes))
    assert lines[-1].startswith(f"grouped_gemm: 4 grouped_gemm: {text}")
    assert launches(lines) == []


@pytest.mark.parametrize(
    ("sizes", "needs"),
    [
        ([1000, 8, 512, 3], (92, 92 * 3 * 128 * 64 * 4)),
        ([1000, 1, 512, 2], (16 * 4, 16 * 4 * 2 * 128 * 64 * 4)),
        ([2, 8, 100, 4], (2, 2 * 4 * 128 * 64 * 4)),
        ([0, 8, 512, 4], (0, 0)),
    ],
    ids=str,
)
def test_what_a_split_product_needs(
    host_library: Path, fake_driver: Path, sizes: list[int], needs: tuple[int, int]
) -> None:
    lines = call(host_library, fake_driver, ("split_needs", [TILE, *sizes], {}))
    assert lines == [f"split_needs: {needs}"]


QUANTISED = PRODUCT | {
    "scales": 16,
    "zeros": 0,
    "num_bits": 4,
    "group_size": 128,
    "tile": (128, 64, 64, *TILE[3:]),
}


def test_a_quantised_launch(host_library: Path, fake_driver: Path, kernels: Path) -> None:
    name = "quant_gemm_f16_int4_w128_t64_d64_s2_2x2_swiglu"
    (kernels / "75" / f"{name}.cubin").write_text("image")
    quantised = ("quant_gemm", [], QUANTISED | {"swiglu": True})
    lines = call(host_library, fake_driver, opened(kernels), BIND, quantised)
    # A stage: 4096 bytes of weights, 512 of scales, 512 of zeros and 8192 of tokens.
    shared_bytes = 2 * (4096 + 2 * 512 + 8192) + 1024
    expected = f"launch {name} grid 184 block 128 shared {shared_bytes} stream 7 attributes"
    assert launches(lines) == [expected]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_bits": 3}, "weights of 3 bits; 4 or 8"),
        ({"group_size": 16}, "groups of 16; 32, 64 or 128"),
        ({"scales": 0}, "no scales"),
        ({"depth": 12}, "depth 12 and 512 features must be multiples of 8"),
    ],
    ids=str,
)
def test_bad_quantised_arguments(
    host_library: Path, fake_driver: Path, kernels: Path, changes: dict, text: str
) -> None:
    wrong = ("quant_gemm", [], QUANTISED | changes)
    lines = call(host_library, fake_driver, opened(kernels), BIND, wrong)
    assert lines[-1].startswith(f"quant_gemm: 4 quant_gemm: {text}")
    assert launches(lines) == []
