"""liblight_ops on a real driver, from threads, in captures and with PTX; needs `make kernels`."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightmoe.errors import MachineError
from lightmoe.kernels import library
from lightmoe.kernels.library import Library, address
from lightmoe.kernels.tiles import candidates

pytestmark = pytest.mark.gpu
NUM_PAIRS, DEPTH, NUM_FEATURES = 200, 256, 128


class Product:
    """rows [200, 256] times one weight [128, 256], in fp16, by any tile that was built."""

    def __init__(self, opened: Library) -> None:
        self.library = opened
        self.device = torch.device("cuda", torch.cuda.current_device())
        architecture = opened.architecture_of(self.device)
        names = opened.manifest.kernels[architecture]
        self.tile = next(
            tile.fields
            for tile in candidates(int(architecture.removesuffix("ptx")), 16)
            if f"grouped_gemm_f16_{tile.name}_plain" in names
        )
        generator = torch.Generator("cuda").manual_seed(3)
        self.rows = torch.randn(
            NUM_PAIRS, DEPTH, device="cuda", dtype=torch.float16, generator=generator
        )
        self.weight = torch.randn(
            NUM_FEATURES, DEPTH, device="cuda", dtype=torch.float16, generator=generator
        )
        self.output = torch.full_like(self.rows[:, :NUM_FEATURES], torch.nan).contiguous()

    def launch(self) -> None:
        self.library.launch(
            "grouped_gemm",
            self.device,
            groups=(0, 0, 0, 0, 1, NUM_PAIRS),
            tile=self.tile,
            dtype=0,
            rows=address(self.rows),
            pair_row=0,
            weights=address(self.weight),
            slot_bytes=0,
            pair_weight=0,
            output=address(self.output),
            depth=DEPTH,
            num_features=NUM_FEATURES,
            swiglu=False,
            output_float32=False,
            max_ctas=0,
        )

    def error(self) -> float:
        expected: Tensor = self.rows.double() @ self.weight.double().T
        return float((self.output.double() - expected).norm() / expected.norm())


def in_a_thread(function: Callable[[], None]) -> None:
    """Run in a new thread, and raise here what it raised."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def test_a_thread_that_has_no_context_yet() -> None:
    product = Product(library.library())
    in_a_thread(product.launch)
    torch.cuda.synchronize()
    assert product.error() < 1e-3


def test_the_first_launch_may_be_in_a_capture(tmp_path: Path) -> None:
    # What is loaded is known by its path, so a copy is loaded again.
    copy = shutil.copytree(library.FOLDER, tmp_path / "lib")
    with library.using(copy) as fresh:
        product = Product(fresh)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            product.launch()
        torch.cuda.synchronize()
        assert product.output.isnan().all(), "a capture computes nothing"
        graph.replay()
        torch.cuda.synchronize()
        assert product.error() < 1e-3


def test_the_ptx_of_turing() -> None:
    with library.using(architecture="75ptx") as turing:
        product = Product(turing)
        assert turing.architecture_of(product.device) == "75ptx"
        product.launch()
        torch.cuda.synchronize()
        assert product.error() < 1e-3


def test_an_architecture_that_was_not_built() -> None:
    with (
        library.using(architecture="70ptx") as none,
        pytest.raises(MachineError, match="holds no kernels for sm_70ptx: make kernels"),
    ):
        none.architecture_of(torch.device("cuda"))
