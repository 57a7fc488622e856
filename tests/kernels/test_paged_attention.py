"""paged_attention without a GPU: the reference, what the wrapper refuses, and what is launched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.kernels import paged_attention
from lightmoe.kernels.paged_attention import SECTION
from lightmoe.kernels.paged_attention import paged_attention as native
from tests.kernels.builds import build, compiles
from tests.kernels.drivers import BIND, Call, call, launches, opened

LAUNCH = re.compile(r"launch (\w+) grid (\d+) block (\d+) shared (\d+)")
WIDTHS = (32, 64, 128, 256, 576)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_the_reference_is_causal_attention_over_pages() -> None:
    keys, values, query = random(5, 4, 2, 8), random(5, 4, 2, 8, seed=1), random(4, 6, 8, seed=2)
    keys[2], values[2] = float("nan"), float("nan")
    keys[4, 2:], values[4, 2:] = float("nan"), float("nan")
    tables = torch.tensor([[3, 4], [1, 2]], dtype=torch.int32)

    found = paged_attention(
        query, keys, values, tables, integers(0, 3, 4), integers(6, 3), max_queries=3
    )

    past = [(pages[[3, 4]].flatten(0, 1), pages[1]) for pages in (keys, values)]
    for row, (sequence, seen) in enumerate([(0, 4), (0, 5), (0, 6), (1, 3)]):
        for head in range(6):
            rows, sums = (pages[sequence][:seen, head // 3] for pages in past)
            weights = (rows @ query[row, head] * 8**-0.5).softmax(dim=0)
            torch.testing.assert_close(found[row, head], weights @ sums)


def test_rows_that_see_nothing_are_zeros() -> None:
    pages, query = random(3, 4, 2, 8), random(5, 2, 8, seed=2)
    tables = torch.tensor([[0], [1], [2]], dtype=torch.int32)

    found = paged_attention(
        query, pages, pages, tables, integers(0, 3, 4, 4), integers(2, 0, 4), max_queries=3
    )

    assert found[1:3].any(dim=-1).all()
    assert not found[[0, 3, 4]].any()


HALF = torch.float16
GOOD = {
    "query": torch.zeros(5, 8, 64, dtype=HALF),
    "keys": torch.zeros(6, 16, 4, 64, dtype=HALF),
    "values": torch.zeros(6, 16, 4, 64, dtype=HALF),
    "block_tables": torch.zeros(2, 3, dtype=torch.int32),
    "query_starts": integers(0, 4, 5),
    "lengths": integers(40, 8),
}


def pages(*shape: int, dtype: torch.dtype = HALF) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=dtype) for name in ("keys", "values")}


def wide(width: int) -> dict[str, Tensor]:
    return pages(6, 16, 4, width) | {"query": torch.zeros(5, 8, width, dtype=HALF)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"query": torch.zeros(5, 8, 64)}, "query is torch.float32; it needs float16"),
        ({"query": torch.zeros(5, 512, dtype=HALF)}, "query has 2 dimensions [5, 512]; it needs 3"),
        ({"query": torch.zeros(5, 8, 32, dtype=HALF)}, "keys has size 64 in dimension 3 of"),
        ({"values": torch.zeros(6, 16, 4, 32, dtype=HALF)}, "values has size 32 in dimension 3"),
        (pages(6, 16, 4, 64, dtype=torch.bfloat16), "keys is torch.bfloat16; it needs torch.flo"),
        (pages(6, 16, 3, 64), "query has 8 heads over 3 of keys; it takes a multiple"),
        (pages(6, 24, 4, 64), "keys has blocks of 24 positions; it takes (8, 16, 32"),
        (wide(60), "query has size 60 in dimension 2 of [5, 8, 60]; it needs a multiple of 8"),
        (wide(264), "query has width 264; it takes up to 256"),
        (
            {"keys": torch.zeros(12, 16, 4, 64, dtype=HALF)[::2]},
            "keys has gaps between its pages; give .contiguous()",
        ),
        (
            {"query": torch.zeros(5, 516, dtype=HALF)[:, :512].unflatten(1, (8, 64))},
            "query has tokens 516 elements apart; it needs a multiple of 8",
        ),
        (
            {"query": torch.zeros(1, 516, dtype=HALF)[:, :512].unflatten(1, (8, 64))},
            "query is on cpu; it needs a CUDA device",
        ),
        ({"query": torch.zeros(5, 64, 8, dtype=HALF).mT}, "query has strides [512, 1, 8] for"),
        ({"block_tables": integers(0, 1)}, "block_tables has 1 dimensions [2]; it needs 2"),
        (
            {"block_tables": torch.zeros(2, 3, dtype=torch.int64)},
            "block_tables is torch.int64; it needs torch.int32",
        ),
        ({"query_starts": integers(0, 5)}, "query_starts has size 2 in dimension 0 of [2]; it nee"),
        ({"lengths": integers(0, 5, 7)}, "lengths has size 3 in dimension 0 of [3]; it needs 2"),
        ({"lengths": integers(0, 1, 5, 7)[::2]}, "lengths has gaps; give .contiguous()"),
        ({}, "query is on cpu; it needs a CUDA device"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Tensor], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        native(*(GOOD | changes).values(), max_queries=4)

    assert str(raised.value).startswith("paged_attention: ")
    assert said in str(raised.value)


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A folder of files that pretend to be kernels for sm_75, sm_86 and sm_90."""
    for architecture in ("75", "86", "90"):
        (tmp_path / architecture).mkdir()
        for dtype in ("f16", "bf16"):
            for width in WIDTHS:
                name = f"paged_attention_{dtype}_w{width}.cubin"
                (tmp_path / architecture / name).write_text("image")
    return tmp_path


SIZES = {
    "num_tokens": 4,
    "num_sequences": 4,
    "num_heads": 32,
    "num_kv_heads": 8,
    "width": 128,
    "block_size": 16,
    "table_stride": 64,
    "max_queries": 1,
}


def attention(**changes: object) -> Call:
    arguments = dict.fromkeys(
        ("query", "keys", "block_tables", "query_starts", "lengths", "output", "workspace"), 16
    )
    arguments |= {"values": 32, "workspace_bytes": 1 << 30, "query_stride": 6144, "scale": 0.1}
    arguments |= {"dtype": 1, "stream": 7, "sizes": list((SIZES | changes).values())[:8]}
    return ("paged_attention", [], arguments | {k: changes[k] for k in changes if k not in SIZES})


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [("w128_split", 128), ("w128_merge", 32)]),  # 4 sections x 4 sequences x 8 heads
        ({"table_stride": 16}, [("w128_split", 32)]),
        ({"num_sequences": 300}, [("w128_split", 68 * 4), ("w128_merge", 2400)]),
        ({"num_heads": 160}, [("w128_split", 256), ("w128_merge", 160)]),
        (
            {"num_tokens": 103, "max_queries": 100},
            [("w128_whole", 8 * (3 + 4)), ("w128_split", 128), ("w128_merge", 32)],
        ),
        ({"num_tokens": 100, "num_sequences": 1, "max_queries": 100}, [("w128_whole", 8 * 4)]),
        ({"width": 80, "num_tokens": 0}, []),
        ({"width": 80, "num_sequences": 0}, []),
        ({"width": 8}, [("w32_split", 128), ("w32_merge", 32)]),
        ({"width": 72}, [("w128_split", 128), ("w128_merge", 32)]),
        ({"width": 136}, [("w256_split", 128), ("w256_merge", 32)]),
        ({"width": 264, "values": 16}, [("w576_split", 128), ("w576_merge", 32)]),
    ],
)
def test_what_is_launched(
    host_library: Path, fake_driver: Path, kernels: Path, changes: dict, wanted: list
) -> None:
    lines = call(
        host_library,
        fake_driver,
        opened(kernels),
        BIND,
        attention(**changes),
        FAKE_CAPABILITY=90,
    )

    assert lines[-1] == "paged_attention: 0"
    found = [LAUNCH.match(line).groups()[:2] for line in launches(lines)]
    assert found == [(f"paged_attention_bf16_{name}", str(grid)) for name, grid in wanted]


@pytest.mark.parametrize(("capability", "most"), [(75, 64 << 10), (86, 99 << 10), (90, 227 << 10)])
@pytest.mark.parametrize("width", WIDTHS)
def test_kernels_fit_the_shared_memory(
    host_library: Path, fake_driver: Path, kernels: Path, width: int, capability: int, most: int
) -> None:
    wanted = attention(width=width, num_tokens=103, max_queries=100, values=16, dtype=0)

    lines = call(
        host_library, fake_driver, opened(kernels), BIND, wanted, FAKE_CAPABILITY=capability
    )

    whole, split, _ = (LAUNCH.match(line).groups() for line in launches(lines))
    assert 0 < int(split[3]) <= int(whole[3]) <= most
    few = 4 if capability == 90 and width >= 64 else 1
    assert int(split[2]) == {128: 32 * few, 256: 64, 576: 128}[max(width, 128)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 12}, "width 12 is no multiple of 8 up to 256"),
        ({"width": 264}, "width 264 is no multiple of 8 up to 256"),
        ({"width": 584, "values": 16}, "width 584 is no multiple of 8 up to 576"),
        ({"num_kv_heads": 5}, "32 heads over 5 KV heads"),
        ({"block_size": 24}, "blocks of 24 positions, which must be a power of 2 from 8 to 256"),
        ({"block_size": 512}, "blocks of 512 positions"),
        ({"scale": 0.0}, "scale 0 is not positive"),
        ({"dtype": 2}, "dtype 2 is neither fp16 nor bf16"),
        ({"lengths": 0}, "an input or output is null"),
        ({"workspace_bytes": 99}, "the workspace needs 266240 bytes, it has 99"),
        ({"table_stride": 1 << 27}, "2147483648 positions are too many"),
    ],
)
def test_what_is_refused(
    host_library: Path, fake_driver: Path, kernels: Path, changes: dict, said: str
) -> None:
    lines = call(host_library, fake_driver, opened(kernels), BIND, attention(**changes))

    assert launches(lines) == []
    assert lines[-1].startswith("paged_attention: 4 paged_attention: ")
    assert said in lines[-1]


@compiles
def test_kernels_of_the_usual_width_spill_nothing(checkout: Path, tmp_path: Path) -> None:
    pattern = "^paged_attention_bf16_w128$"

    built = build(checkout, tmp_path, "--arch", "80,90", "--instances", pattern)

    entries = [entry for kernels in built.values() for entry in kernels]
    assert len(entries) == 2 * len(("split", "whole", "merge"))
    assert [entry["name"] for entry in entries if entry["spill_bytes"]] == []


def test_sizes_are_those_of_the_kernels(module, checkout: Path) -> None:
    text = (checkout / "cute_kernels/paged_attention_sizes.h").read_text(encoding="utf-8")
    assert f"kSection = {SECTION};" in text
    assert f"kWidths[] = {{{', '.join(map(str, WIDTHS))}}}" in text
    assert module("instances").ATTENTION_WIDTHS == WIDTHS
