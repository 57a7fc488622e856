"""What the tests of kernels share: one thread a product, and a liblight_ops to look into."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels.drivers import HERE, compile_driver
from tests.kernels.pairs import NATIVE, ROADS, SPLITTING, Road, has_split_tiles, on_road


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As every rank has: a second one may cut a sum elsewhere."""
    torch.set_num_threads(1)


@pytest.fixture
def module(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of cute_kernels/ by its name."""
    monkeypatch.syspath_prepend(checkout / "cute_kernels")
    return importlib.import_module


@pytest.fixture(scope="session")
def toolchain(host_library: Path, checkout: Path) -> Path:
    """Where NVRTC and the headers are, once something has been built."""
    return checkout / "build/toolchain"


@pytest.fixture(scope="session")
def host_library(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with liblight_ops.so and its binding, built now, without kernels."""
    out = tmp_path_factory.mktemp("host")
    command = [sys.executable, str(checkout / "cute_kernels/build.py"), "--host-only"]
    subprocess.run([*command, "--out", str(out)], check=True)
    return out


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that tells what it is asked."""
    return compile_driver(tmp_path_factory.mktemp("driver"), HERE / "fake_driver.cpp")


@pytest.fixture(scope="module", params=ROADS, ids=str)
def road(request: pytest.FixtureRequest) -> Iterator[Road]:
    """Every road there is."""
    with on_road(request.param) as chosen:
        yield chosen


@pytest.fixture(scope="module", params=NATIVE, ids=str)
def native(request: pytest.FixtureRequest) -> Iterator[Road]:
    """The card's own kernels."""
    with on_road(request.param) as chosen:
        yield chosen


@pytest.fixture(scope="module", params=SPLITTING, ids=str)
def splitting(request: pytest.FixtureRequest) -> Iterator[Road]:
    """Kernels whose CTAs may share the depth of an output."""
    with on_road(request.param) as chosen:
        if not has_split_tiles():
            pytest.skip("tiles of warpgroups share no depth among CTAs")
        yield chosen
