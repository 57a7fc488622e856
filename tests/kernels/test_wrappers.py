"""What liblight_ops' wrappers refuse, with the name of the tensor and the size that differs."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.kernels import PairGroups
from lightmoe.kernels.fp8_gemm import fp8_gemm
from lightmoe.kernels.grouped_gemm import GroupedProduct, grouped_gemm
from lightmoe.kernels.matmul import matmul
from lightmoe.kernels.products import Plan
from lightmoe.kernels.quant_gemm import quant_gemm
from lightmoe.kernels.tiles import Tile
from lightmoe.quant.fp8 import Fp8ExpertLayout, Fp8Matrix, Scaling
from lightmoe.quant.fragments import PackedMatrix
from lightmoe.quant.packing import QuantizedExpertLayout

HALF = torch.float16
GROUPS = replace(
    PairGroups.from_counts([1, 0], [3, 2]),
    tile_offsets=torch.zeros(3, dtype=torch.int32),
    tile_groups=torch.zeros(4, dtype=torch.int32),
    tokens_per_tile=8,
)


def half(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": half(5, 24)}, "rows has size 24 in dimension 1 of [5, 24]; it needs 16"),
        ({"rows": half(4, 16)}, "rows has size 4 in dimension 0 of [4, 16]; it needs 5"),
        ({"rows": half(16)}, "rows has 1 dimensions [16]; it needs 2"),
        ({"rows": half(5, 16, dtype=torch.float32)}, "rows is torch.float32; it needs float16 or"),
        ({"rows": half(5, 16, dtype=torch.bfloat16)}, "weights is torch.float16; it needs torch.b"),
        ({"rows": half(16, 5).t()}, "rows has strides [1, 5] for [5, 16]; its rows need to follow"),
        ({"rows": half(81)[1:].view(5, 16)}, "rows begins at an address that is no multiple of 16"),
        ({"rows": half(5, 12), "weights": half(2, 32, 12)}, "rows has size 12 in dimension 1"),
        ({"weights": half(2, 28, 16)}, "weights has size 28 in dimension 1 of [2, 28, 16]"),
        ({"weights": half(32, 16)}, "weights has 2 dimensions [32, 16]; it needs 3"),
        ({"weights": half(2, 24, 16), "swiglu": True}, "it needs a multiple of 16"),
        ({"row_index": torch.zeros(4, dtype=torch.int32)}, "row_index has size 4 in dimension 0"),
        ({"row_index": torch.zeros(5, dtype=torch.int64)}, "row_index is torch.int64; it needs"),
        ({"pair_weight": torch.zeros(6)}, "pair_weight has size 6 in dimension 0 of [6]; it needs"),
        ({"pair_weight": half(5)}, "pair_weight is torch.float16; it needs torch.float32"),
        ({"groups": replace(GROUPS, tile_groups=None)}, "groups has no tile table; sort the pairs"),
        ({}, "rows is on cpu; it needs a CUDA device"),
    ],
)
def test_grouped_gemm_names_what_does_not_fit(changes: dict[str, object], said: str) -> None:
    arguments = {"rows": half(5, 16), "weights": half(2, 32, 16), "groups": GROUPS} | changes

    with pytest.raises(UsageError) as raised:
        grouped_gemm(**arguments)

    assert str(raised.value).startswith("grouped_gemm: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


class PlanningLibrary:
    """Counts launches."""

    def __init__(self) -> None:
        self.launched: list[int] = []

    def launch(self, stem: str, device: torch.device, **given: Any) -> None:
        """Note the rows."""
        assert stem == "grouped_gemm"
        self.launched.append(given["rows"])


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pairs of each plan that is made, over tensors of the host."""
    made: list[int] = []
    plan = Plan(Tile(128, 64, 32, 2, 2, 2), (128, 64, 32, 2, 2, 2, 0, 0, 1))
    module = sys.modules["lightmoe.kernels.grouped_gemm"]
    monkeypatch.setattr(module, "plan_weights", lambda _, num, *__, **___: made.append(num) or plan)
    monkeypatch.setattr(module, "require_cuda", lambda *_, **__: None)
    return made


def use(library: PlanningLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lightmoe.kernels.grouped_gemm"], "library", lambda: library)


def test_rows_alike_are_planned_for_once(
    planned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    library, rows = PlanningLibrary(), [half(5, 16), half(5, 16)]
    use(library, monkeypatch)
    product = GroupedProduct(half(2, 32, 16), swiglu=True)

    outputs = [product(one, GROUPS) for one in rows]
    product(half(9, 16), GROUPS, torch.zeros(5, dtype=torch.int32))

    assert [output.shape for output in outputs] == [(5, 16), (5, 16)]
    assert library.launched[:2] == [one.data_ptr() for one in rows]
    assert planned == [5, 5]  # gathered rows are others


def test_other_kernels_have_other_plans(
    planned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    product = GroupedProduct(half(2, 32, 16))
    for library in (PlanningLibrary(), PlanningLibrary()):
        use(library, monkeypatch)
        product(half(5, 16), GROUPS)
        assert len(library.launched) == 1
    assert planned == [5, 5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": half(4, 16)}, "rows has size 4 in dimension 0"),
        ({"rows": half(5, 16, dtype=torch.bfloat16)}, "weights is torch.float16; it needs torch.b"),
        ({"rows": half(16, 5).t()}, "rows has strides [1, 5] for [5, 16]"),
        ({"rows": half(81)[1:].view(5, 16)}, "rows begins at an address that is no multiple of 16"),
        ({"pair_weight": half(5)}, "pair_weight is torch.float16; it needs torch.float32"),
        ({"output": half(5, 16)}, "output has size 16 in dimension 1"),
        ({"output_rows": torch.zeros(4, dtype=torch.int64)}, "output_rows has size 4 in dim"),
        ({"groups": replace(GROUPS, tile_groups=None)}, "groups has no tile table"),
    ],
)
def test_rows_that_do_not_fit_are_refused_behind_others_that_did(
    planned: list[int], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    library = PlanningLibrary()
    use(library, monkeypatch)
    product = GroupedProduct(half(2, 32, 16))
    given: dict[str, Any] = {"rows": half(5, 16), "groups": GROUPS}
    product(**given)

    with pytest.raises(UsageError) as raised:
        product(**(given | changes))

    assert said in str(raised.value)
    assert len(library.launched) == len(planned) == 1


@pytest.mark.parametrize(
    ("rows", "weight", "said"),
    [
        (half(5, 24), half(32, 16), "matmul: rows has size 24 in dimension 1 of [5, 24]; it needs"),
        (half(5, 16), half(30, 16), "matmul: weight has size 30 in dimension 0 of [30, 16]; it"),
        (half(5, 16), half(1, 32, 16), "matmul: weight has 3 dimensions [1, 32, 16]; it needs 2"),
        (half(5, 16), half(32, 16), "matmul: rows is on cpu; it needs a CUDA device"),
    ],
)
def test_matmul_names_what_does_not_fit(rows: Tensor, weight: Tensor, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        matmul(rows, weight)

    assert str(raised.value).startswith(said)


def packed(depth: int = 64, num_slots: int = 2) -> PackedMatrix:
    """Quantised weights [32, depth] of some slots, in one blob each."""
    layout = QuantizedExpertLayout(depth, 32, 4, 32, symmetric=False, dtype=HALF)
    blobs = torch.zeros(num_slots, layout.num_elements, dtype=torch.uint8)
    return layout.views(blobs)[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": half(5, 32)}, "rows has size 32 in dimension 1 of [5, 32]; it needs 64"),
        ({"rows": half(5, 64, dtype=torch.bfloat16)}, "scales is torch.float16; it needs torch.b"),
        ({"rows": half(4, 64)}, "rows has size 4 in dimension 0 of [4, 64]; it needs 5"),
        ({"pair_weight": torch.zeros(3)}, "pair_weight has size 3 in dimension 0 of [3]; it needs"),
        ({"experts": replace(packed(), zeros=half(2, 4, 2, 8))}, "zeros has size 8 in dimension 3"),
        (
            {"experts": replace(packed(), scales=half(2, 4, 2, 16), zeros=None)},
            "slots of scales are 256 bytes",
        ),
        (
            {"experts": replace(packed(), scales=half(1, 4, 2, 16), zeros=None)},
            "scales has size 1 in dim",
        ),
        ({}, "rows is on cpu; it needs a CUDA device"),
    ],
)
def test_quant_gemm_names_what_does_not_fit(changes: dict[str, object], said: str) -> None:
    arguments = {"rows": half(5, 64), "experts": packed(), "groups": GROUPS} | changes

    with pytest.raises(UsageError) as raised:
        quant_gemm(**arguments)

    assert str(raised.value).startswith("quant_gemm: ")
    assert said in str(raised.value)


def e4m3(width: int = 272, scaling: Scaling = "block") -> Fp8Matrix:
    """Gate and up weights [2 x 144, width] of two slots, in one blob each."""
    layout = Fp8ExpertLayout(width, 144, scaling)
    return layout.views(torch.zeros(2, layout.num_elements, dtype=torch.uint8))[0]


def codes(*shape: int) -> Tensor:
    return torch.zeros(shape).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": half(5, 272)}, "rows is torch.float16; it needs torch.float8_e4m3fn"),
        ({"rows": codes(5, 256)}, "rows has size 256 in dimension 1 of [5, 256]; it needs 272"),
        ({"rows": codes(4, 272)}, "rows has size 4 in dimension 0 of [4, 272]; it needs 5"),
        (
            {"rows": codes(5, 264), "experts": e4m3(264)},
            "rows has size 264 in dimension 1 of [5, 264]; it needs a multiple of 16",
        ),
        ({"row_scales": torch.zeros(5, 2)}, "row_scales has size 2 in dimension 1"),
        ({"row_scales": torch.zeros(5)}, "row_scales has 1 dimensions [5]; it needs 2"),
        ({"row_scales": half(5, 3)}, "row_scales is torch.float16; it needs torch.float32"),
        ({"row_scales": torch.zeros(3, 5).t()}, "row_scales has gaps; give .contiguous()"),
        ({"experts": e4m3(scaling="channel")}, "row_scales has 2 dimensions [5, 3]; it needs 1"),
        ({"row_index": torch.zeros(5)}, "row_index is torch.float32; it needs torch.int32"),
        ({"pair_weight": torch.zeros(3)}, "pair_weight has size 3 in dimension 0 of [3]; it needs"),
        ({"dtype": torch.float64}, "dtype is torch.float64; it needs float16, bfloat16"),
        ({"dtype": torch.float32}, "dtype is torch.float32; it needs float16, bfloat16"),
        (
            {"experts": replace(e4m3(), scales=torch.zeros(2, 4, 3))},
            "slots of scales are 48 bytes apart, those of codes",
        ),
        ({"experts": replace(e4m3(), codes=codes(2, 272, 288).mT)}, "its rows need to follow"),
        ({"groups": replace(GROUPS, tile_groups=None)}, "groups has no tile table; sort the pairs"),
        ({}, "rows is on cpu; it needs a CUDA device"),
    ],
)
def test_fp8_gemm_names_what_does_not_fit(changes: dict[str, object], said: str) -> None:
    arguments = {
        "rows": codes(5, 272),
        "row_scales": torch.zeros(5, 3),
        "experts": e4m3(),
        "groups": GROUPS,
        "dtype": HALF,
    } | changes

    with pytest.raises(UsageError) as raised:
        fp8_gemm(**arguments)

    assert str(raised.value).startswith("fp8_gemm: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
