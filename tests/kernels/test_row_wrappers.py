"""What the wrappers of topk_gate, sort_pairs, combine and permute refuse, and how they say it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.kernels import reference
from lightmoe.kernels.combine import combine
from lightmoe.kernels.permute import dequantize_rows, permute, permute_fp8, permute_int8
from lightmoe.kernels.sort_pairs import PairTable, sort_pairs
from lightmoe.kernels.topk_gate import route_tokens, topk_gate

HALF = torch.float16


def half(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def refusal(call: Callable[..., object], *arguments: object, **named: object) -> str:
    with pytest.raises(UsageError) as raised:
        call(*arguments, **named)
    assert "\n" not in str(raised.value)
    return str(raised.value)


GATE = {
    "hidden": half(5, 16),
    "router_weight": half(8, 16),
    "num_experts_per_token": 2,
    "renormalize": True,
}
LOGITS = {"hidden": None, "router_weight": None, "logits": torch.zeros(5, 8)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden": half(5, 24)}, "hidden has size 24 in dimension 1 of [5, 24]; it needs 16"),
        (
            {"hidden": half(5, 12), "router_weight": half(8, 12)},
            "hidden has size 12 in dimension 1",
        ),
        ({"hidden": half(5, 16, dtype=torch.float32)}, "hidden is torch.float32; it needs float16"),
        ({"router_weight": half(8, 16, dtype=torch.bfloat16)}, "router_weight is torch.bfloat16"),
        ({"router_weight": half(16, 8).t()}, "router_weight has strides [1, 8] for [8, 16]"),
        ({"router_weight": half(513, 16)}, "513 experts; it takes 1 to 512"),
        ({"hidden": None}, "it needs logits, or hidden and router_weight; give them"),
        ({"num_experts_per_token": 9}, "9 experts per token of 8; it takes 1 to 8"),
        ({"num_experts_per_token": 0}, "0 experts per token of 8; it takes 1 to 8"),
        ({"num_groups": 3}, "3 groups of 8 experts; it takes up to 32 of the same size"),
        ({"num_groups": 8}, "1 of 8 groups per token hold 1 experts; 2 are to be chosen"),
        (
            {"num_groups": 8, "num_groups_per_token": 4, "scoring": "sigmoid"},
            "sigmoid groups have 1 expert; they need two",
        ),
        ({"bias": torch.zeros(8)}, "bias goes with sigmoid scores, not softmax"),
        ({"bias": torch.zeros(7), "scoring": "sigmoid"}, "bias has size 7 in dimension 0 of [7]"),
        ({"bias": half(8), "scoring": "sigmoid"}, "bias is torch.float16; it needs torch.float32"),
        (LOGITS | {"logits": torch.zeros(8)}, "logits has 1 dimensions [8]; it needs 2"),
        (LOGITS | {"logits": integers(5, 8)}, "logits is torch.int32; it needs float32, float16"),
        (LOGITS, "logits is on cpu; it needs a CUDA device"),
        ({}, "hidden is on cpu; it needs a CUDA device"),
    ],
)
def test_topk_gate_names_what_does_not_fit(changes: dict[str, object], said: str) -> None:
    for call, more in ((topk_gate, {}), (route_tokens, {"slots": None, "tokens_per_tile": 16})):
        text = refusal(call, **(GATE | changes | more))
        assert text.startswith("topk_gate: ")
        assert said in text


SORT = {"experts": integers(5, 2), "num_experts": 8, "slots": integers(8), "tokens_per_tile": 16}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": integers(10)}, "experts has 1 dimensions [10]; it needs 2"),
        ({"experts": integers(5, 17)}, "experts has size 17 in dimension 1; it takes 1 to 16"),
        ({"num_experts": 513}, "513 experts; it takes 1 to 512"),
        ({"weights": torch.zeros(5, 2)}, "weights and pair_weight go together; give both or none"),
        (
            {"weights": torch.zeros(4, 2), "pair_weight": torch.zeros(10)},
            "weights has size 4 in dimension 0 of [4, 2]; it needs 5",
        ),
        ({}, "experts is on cpu; it needs a CUDA device"),
    ],
)
def test_sort_pairs_names_what_does_not_fit(changes: dict[str, object], said: str) -> None:
    text = refusal(sort_pairs, **(SORT | changes))
    assert text.startswith("sort_pairs: ")
    assert said in text


@pytest.mark.parametrize("tokens_per_tile", [8, 24, 192, 256])
def test_tables_have_room_for_tiles_of_any_multiple_of_eight(tokens_per_tile: int) -> None:
    experts = torch.arange(40, dtype=torch.int32).view(20, 2) % 3

    table = PairTable.empty(experts, 8, integers(8), tokens_per_tile)

    wanted, *_ = reference.sort_pairs(experts, 8, integers(8), tokens_per_tile)
    assert table.groups.tokens_per_tile == tokens_per_tile
    assert len(table.groups.tile_groups) >= len(wanted.tile_groups)


@pytest.mark.parametrize("tokens_per_tile", [-8, 0, 1, 4, 12, 264, 512])
def test_tiles_that_are_refused(tokens_per_tile: int) -> None:
    said = refusal(PairTable.empty, integers(5, 2), 8, integers(8), tokens_per_tile)

    assert said == (
        f"sort_pairs: tokens_per_tile {tokens_per_tile}; it takes multiples of 8 up to 256"
    )


COMBINE = {"pairs": half(10, 16), "pair_index": integers(5, 2), "weights": torch.zeros(5, 2)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pairs": half(10, 12)}, "pairs has size 12 in dimension 1 of [10, 12]; it needs a mult"),
        ({"pairs": half(10, 16, dtype=torch.float32)}, "pairs is torch.float32; it needs float16"),
        ({"pairs": half(16, 10).t()}, "pairs has strides [1, 10] for [10, 16]"),
        ({"pair_index": integers(10)}, "pair_index has 1 dimensions [10]; it needs 2"),
        ({"weights": torch.zeros(5, 3)}, "weights has size 3 in dimension 1 of [5, 3]; it needs 2"),
        ({"weights": half(5, 2)}, "weights is torch.float16; it needs torch.float32"),
        ({"addend": half(5, 8)}, "addend has size 8 in dimension 1 of [5, 8]; it needs 16"),
        (
            {"addend": half(5, 16, dtype=torch.bfloat16)},
            "addend is torch.bfloat16; it needs torch.float16",
        ),
        ({}, "pairs is on cpu; it needs a CUDA device"),
    ],
)
def test_combine_names_what_does_not_fit(changes: dict[str, object], said: str) -> None:
    text = refusal(combine, **(COMBINE | changes))
    assert text.startswith("combine: ")
    assert said in text


@pytest.mark.parametrize(
    ("call", "arguments", "said"),
    [
        (
            permute,
            (half(5, 12), integers(3)),
            "permute: rows has size 12 in dimension 1 of [5, 12]",
        ),
        (permute, (half(5, 16), integers(3, 1)), "permute: row_index has 2 dimensions [3, 1]"),
        (permute, (half(5, 16), integers(3)), "permute: rows is on cpu; it needs a CUDA device"),
        (
            permute_int8,
            (integers(5, 16), integers(3)),
            "permute_int8: rows is torch.int32; it needs",
        ),
        (permute_fp8, (torch.zeros(5, 16),), "permute_fp8: rows is torch.float32; it needs"),
        (permute_fp8, (half(5, 12),), "permute_fp8: rows has size 12 in dimension 1 of [5, 12]"),
        (
            permute_fp8,
            (half(5, 16), integers(3, 1)),
            "permute_fp8: row_index has 2 dimensions [3, 1]",
        ),
        (permute_fp8, (half(5, 16),), "permute_fp8: rows is on cpu; it needs a CUDA device"),
        (
            functools.partial(permute_fp8, group_size=64),
            (half(5, 16),),
            "permute_fp8: group_size is 64; give 128 or None",
        ),
        (
            dequantize_rows,
            (integers(5, 16, dtype=torch.int8), torch.zeros(4), HALF),
            "dequantize_rows: scales has size 4 in dimension 0 of [4]; it needs 5",
        ),
        (
            dequantize_rows,
            (integers(5, 16, dtype=torch.int8), torch.zeros(5), torch.float32),
            "dequantize_rows: dtype is torch.float32; it needs float16 or bfloat16",
        ),
        (
            dequantize_rows,
            (half(5, 16), torch.zeros(5), HALF),
            "dequantize_rows: packed is torch.float16; it needs torch.int8",
        ),
    ],
)
def test_permute_names_what_does_not_fit(
    call: Callable[..., object], arguments: tuple[object, ...], said: str
) -> None:
    assert refusal(call, *arguments).startswith(said)
