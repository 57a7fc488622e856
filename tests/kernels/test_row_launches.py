"""How the gate and the kernels of rows are launched, over a driver that tells (drivers.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightmoe.kernels import workspace
from lightmoe.kernels.topk_gate import FUSED_TOKENS, MAX_EXPERTS, MAX_FUSED_WIDTH
from tests.kernels.drivers import BIND, Call, call, launches, opened

STEMS = ("topk_gate", "combine", "permute", "rotary_cache", "add_norm")
LAUNCH = re.compile(r"launch (\w+) grid (\d+) block (\d+) shared (\d+)")


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A folder of files that pretend to be kernels for sm_75 and sm_90."""
    for architecture in ("75", "90"):
        (tmp_path / architecture).mkdir()
        for stem in STEMS:
            (tmp_path / architecture / f"{stem}.cubin").write_text("image")
    return tmp_path


def sort_fields(num_tokens: int, num_experts: int, k: int, **changes: int) -> list[int]:
    fields = {
        "pair_row": 16,
        "pair_index": 16,
        "pair_weight": 0,
        "offsets": 16,
        "counts": 0,
        "tile_offsets": 16,
        "tile_groups": 16,
        "workspace": 16,
        "workspace_bytes": 3 << 20,
        "tokens_per_tile": 16,
        "num_tokens": num_tokens,
        "num_experts": num_experts,
        "num_experts_per_token": k,
    }
    return list((fields | changes).values())


def gate(num_tokens: int, num_experts: int, k: int, **changes: object) -> Call:
    arguments = {
        "logits": 16,
        "hidden": 0,
        "router_weight": 0,
        "bias": 0,
        "experts": 16,
        "weights": 16,
        "sort": sort_fields(num_tokens, num_experts, k),
        "width": 0,
        "sigmoid": False,
        "renormalize": True,
        "scale": 1.0,
        "num_groups": 1,
        "num_groups_per_token": 1,
        "input": 2,
        "router": 2,
        "max_ctas": 0,
        "stream": 7,
    }
    return ("topk_gate", [], arguments | changes)


HIDDEN = {"logits": 0, "hidden": 16, "router_weight": 16, "width": 2048, "input": 1, "router": 1}


def one_launch(host: Path, driver: Path, kernels: Path, wanted: Call) -> tuple[str, int, int, int]:
    lines = call(host, driver, opened(kernels), BIND, wanted)
    (line,) = launches(lines)
    name, *numbers = LAUNCH.match(line).groups()
    return name, *map(int, numbers)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "max_ctas", "name", "grid", "threads"),
    [
        (0, 128, 0, "e128", 1, 128),
        (1, 128, 0, "e128", 1, 128),
        (16, 128, 0, "e128", 1, 544),
        (17, 128, 0, "e128", 5, 256),
        (64, 8, 0, "e8", 1, 544),
        (256, 128, 0, "e128", 24, 384),
        (256, 9, 0, "e32", 24, 384),
        (1000, 512, 0, "e512", 63, 512),
        (20000, 256, 0, "e256", 68, 1024),
        (20000, 257, 0, "e512", 68, 512),
        (20000, 128, 3, "e128", 3, 1024),
        (300, 128, 1, "e128", 1, 1024),
    ],
)
def test_ctas_of_a_gate_all_fit_at_once(
    host_library: Path,
    fake_driver: Path,
    kernels: Path,
    num_tokens: int,
    num_experts: int,
    max_ctas: int,
    name: str,
    grid: int,
    threads: int,
) -> None:
    wanted = gate(num_tokens, num_experts, 1, max_ctas=max_ctas)

    launched = one_launch(host_library, fake_driver, kernels, wanted)

    assert launched[:3] == (f"topk_gate_logits_f32_{name}", grid, threads)
    # Counts of 2 bytes, of four experts at a time, stand for every warp behind what is the same.
    small = one_launch(host_library, fake_driver, kernels, gate(1, 32, 1))
    behind = threads // 32 * -(-num_experts // 4) * 4 * 2 - small[2] // 32 * 32 * 2
    assert abs(launched[3] - small[3] - behind) < 16
    assert launched[3] <= 48 << 10


COOPERATIVE, CLUSTER, OVERLAPPED = 2, 4, 6  # CUlaunchAttributeID


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "most_clusters", "changes", "grid", "threads", "attributes"),
    [
        (16, 128, 4, {}, 1, 544, []),
        (17, 128, 4, {}, 8, 128, [CLUSTER]),
        (128, 128, 4, {}, 8, 544, [CLUSTER]),
        (129, 128, 4, {}, 16, 320, [CLUSTER]),
        (256, 128, 4, {}, 16, 544, [CLUSTER]),
        (256, 512, 4, {}, 16, 512, [CLUSTER]),
        (257, 128, 4, {}, 24, 384, [COOPERATIVE]),
        (512, 8, 4, {}, 8, 544, [CLUSTER]),
        (385, 128, 4, {}, 25, 544, [COOPERATIVE]),
        (128, 128, 0, {}, 8, 544, [CLUSTER]),
        (129, 128, 0, {}, 22, 256, [COOPERATIVE]),
        (129, 128, 4, {"max_ctas": 15}, 15, 320, [COOPERATIVE]),
        (100, 128, 4, {"max_ctas": 7}, 7, 512, [COOPERATIVE]),
        (129, 128, 4, {"sort": sort_fields(129, 128, 1, offsets=0)}, 22, 256, []),
        (64, 128, 4, HIDDEN | {"sort": sort_fields(64, 128, 1)}, 68, 512, []),
    ],
)
def test_where_the_ctas_of_a_gate_meet(
    host_library: Path,
    fake_driver: Path,
    kernels: Path,
    num_tokens: int,
    num_experts: int,
    most_clusters: int,
    changes: dict,
    grid: int,
    threads: int,
    attributes: list[int],
) -> None:
    wanted = gate(num_tokens, num_experts, 1, **changes)
    told = {"FAKE_CAPABILITY": 90, "FAKE_LARGE_CLUSTERS": most_clusters}

    lines = call(host_library, fake_driver, opened(kernels), BIND, wanted, wanted, **told)

    # A large cluster is asked for once, not at every launch.
    assert lines.count("set 14 1") in ([1] if grid == 16 else [0, 1])
    for line in launches(lines):
        assert f" grid {grid} block {threads} " in line
        told_attributes = line.partition("attributes")[2].split()
        assert told_attributes == [str(number) for number in [*attributes, OVERLAPPED]]


@pytest.mark.parametrize(
    ("capability", "num_tokens", "attributes"),
    [(75, 17, "attributes 2"), (80, 17, "attributes 2"), (90, 17, "attributes 4 6")],
)
def test_the_sort_meets_like_the_gate(
    host_library: Path,
    fake_driver: Path,
    kernels: Path,
    capability: int,
    num_tokens: int,
    attributes: str,
) -> None:
    (kernels / "80").mkdir()
    (kernels / "80" / "topk_gate.cubin").write_text("image")
    sort = sort_fields(16 * num_tokens, 128, 2)
    wanted = {"experts": 16, "weights": 0, "sort": sort, "max_ctas": 0, "stream": 7}

    lines = call(
        host_library,
        fake_driver,
        opened(kernels),
        BIND,
        ("sort_pairs", [], wanted),
        FAKE_CAPABILITY=capability,
    )

    (line,) = launches(lines)
    assert line.startswith("launch sort_pairs ")
    assert line.endswith(attributes)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "width", "grid"),
    [(1, 128, 2048, 32), (9, 128, 2048, 64), (64, 8, 4096, 32), (1, 8, 64, 1), (64, 256, 7168, 68)],
)
def test_the_router_product_spreads_its_items(
    host_library: Path,
    fake_driver: Path,
    kernels: Path,
    num_tokens: int,
    num_experts: int,
    width: int,
    grid: int,
) -> None:
    wanted = gate(num_tokens, num_experts, 2, **HIDDEN | {"width": width})
    hopper = {"FAKE_CAPABILITY": 90}

    (line,) = launches(call(host_library, fake_driver, opened(kernels), BIND, wanted, **hopper))

    assert line.startswith(f"launch topk_gate_router_bf16_bf16 grid {grid} block 512 ")


@pytest.mark.parametrize(("num_tokens", "grid"), [(1, 32), (4, 68)])
def test_without_bfloat_mma_a_token_is_an_item(
    host_library: Path, fake_driver: Path, kernels: Path, num_tokens: int, grid: int
) -> None:
    launched = one_launch(host_library, fake_driver, kernels, gate(num_tokens, 128, 2, **HIDDEN))

    assert launched[:3] == ("topk_gate_router_bf16_bf16", grid, 512)


F16, BF16, F32 = 0, 1, 2


@pytest.mark.parametrize(
    ("capability", "num_tokens", "num_experts", "input_dtype", "router", "max_ctas", "launched"),
    [
        (90, 8192, 128, BF16, BF16, 0, "bf16_e128_t128 grid 68 block 256 shared 163840"),
        (90, 1024, 128, BF16, BF16, 0, "bf16_e64_t128 grid 32 block 256 shared 114688"),
        (90, 65, 8, F16, F16, 0, "f16_e16_t64 grid 4 block 256 shared 43008"),
        (90, 8192, 128, BF16, BF16, 5, "bf16_e128_t128 grid 4 block 256 shared 163840"),
        (90, 8192, 128, BF16, F32, 0, "bf16_f32 grid 68 block 512 shared 32768"),
        (75, 8192, 128, F16, F16, 0, "f16_e64_t128 grid 68 block 256 shared 49152"),
        (75, 8192, 128, BF16, BF16, 0, "bf16_bf16 grid 68 block 512 shared 32768"),
        (80, 8192, 128, BF16, BF16, 0, "bf16_e64_t128 grid 68 block 256 shared 98304"),
        (80, 70, 256, F16, F16, 0, "f16_e16_t64 grid 32 block 256 shared 40960"),
    ],
)
def test_tiles_of_the_router_product(
    host_library: Path,
    fake_driver: Path,
    kernels: Path,
    capability: int,
    num_tokens: int,
    num_experts: int,
    input_dtype: int,
    router: int,
    max_ctas: int,
    launched: str,
) -> None:
    (kernels / "80").mkdir()
    (kernels / "80" / "topk_gate.cubin").write_text("image")
    arguments = {"hidden": 16, "router_weight": 16, "logits": 16, "width": 2048, "stream": 7}
    arguments |= {"num_tokens": num_tokens, "num_experts": num_experts, "max_ctas": max_ctas}
    arguments |= {"input": input_dtype, "router": router}
    wanted: Call = ("router_logits", [], arguments)
    told = {"FAKE_CAPABILITY": capability}

    (line,) = launches(call(host_library, fake_driver, opened(kernels), BIND, wanted, **told))

    assert line.startswith(f"launch router_logits_{launched} ")
    paired = capability == 90 and "_t" in launched
    attributes = [CLUSTER] * paired + [OVERLAPPED] * (capability == 90)
    assert line.partition("attributes")[2].split() == [str(number) for number in attributes]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sort": sort_fields(5, 513, 2)}, "5 tokens, 513 experts, 2 of them per token"),
        ({"sort": sort_fields(5, 64, 17)}, "5 tokens, 64 experts, 17 of them per token"),
        ({"sort": sort_fields(-1, 64, 2)}, "-1 tokens"),
        ({"sort": sort_fields(5, 4, 8)}, "no 8 of 4 experts in 1 of 1 groups"),
        ({"num_groups": 3}, "no 2 of 64 experts in 1 of 3 groups"),
        ({"sort": sort_fields(5, 64, 2, tokens_per_tile=12)}, "tokens_per_tile 12 is no multiple"),
        ({"sort": sort_fields(5, 64, 2, tokens_per_tile=264)}, "multiple of 8 up to 256"),
        ({"sort": sort_fields(5, 64, 2, workspace=8)}, "from a multiple of 16"),
        ({"sort": sort_fields(5, 64, 2, workspace_bytes=99)}, "it has 99"),
        ({"sort": sort_fields(5, 64, 2, pair_row=0)}, "an output of the sort or the workspace"),
        ({"logits": 0}, "an input or output is null"),
        (HIDDEN | {"sort": sort_fields(65, 64, 2)}, "65 hidden rows of width 2048 and dtype 1"),
        (HIDDEN | {"width": 12}, "5 hidden rows of width 12"),
        (HIDDEN | {"router": 0}, "hidden of dtype 1, router of dtype 0"),
        (
            {"sort": sort_fields(70000, 64, 2), "max_ctas": 2},
            "35000 tokens for each of 2 CTAs are too many: allow more",
        ),
    ],
)
def test_a_gate_that_is_refused(
    host_library: Path, fake_driver: Path, kernels: Path, changes: dict, said: str
) -> None:
    lines = call(host_library, fake_driver, opened(kernels), BIND, gate(5, 64, 2, **changes))

    assert launches(lines) == []
    assert lines[-1].startswith("topk_gate: 4 topk_gate: ")
    assert said in lines[-1]


def test_the_workspace_has_room_for_the_largest_gate(host_library: Path, fake_driver: Path) -> None:
    sizes = [MAX_EXPERTS, FUSED_TOKENS, MAX_FUSED_WIDTH]

    (line,) = call(host_library, fake_driver, ("workspace_bytes", sizes, {}))

    assert 0 < int(line.split()[1]) <= workspace.BYTES


def test_rows_are_dealt_to_ctas(host_library: Path, fake_driver: Path, kernels: Path) -> None:
    rows = {"rows": 16, "row_index": 16, "output": 16, "max_ctas": 0, "stream": 7}
    sums = {"pairs": 16, "pair_index": 16, "weights": 0, "addend": 0, "output": 16, "stream": 7}
    of_int8 = rows | {"scales": 16, "dtype": 0}
    calls: list[Call] = [
        ("permute", [], rows | {"num_rows": 17, "width_bytes": 32}),
        ("permute", [], rows | {"num_rows": 17, "width_bytes": 32, "max_ctas": 2}),
        ("permute_int8", [], of_int8 | {"num_rows": 9, "width": 2048}),
        ("permute_int8", [], of_int8 | {"num_rows": 9, "width": 7168}),
        ("permute_fp8", [], of_int8 | {"num_rows": 9, "width": 2048, "group_size": 0}),
        ("permute_fp8", [], of_int8 | {"num_rows": 9, "width": 7168, "group_size": 128}),
        ("permute_fp8", [], of_int8 | {"num_rows": 9, "width": 1032, "group_size": 128}),
        ("dequantize_rows", [], of_int8 | {"num_rows": 9, "width": 2048}),
        (
            "combine",
            [],
            sums
            | {"num_tokens": 3, "num_pairs_per_token": 8, "width": 2048}
            | {"dtype": 1, "max_ctas": 0},
        ),
    ]

    lines = call(host_library, fake_driver, opened(kernels), BIND, *calls)

    assert [LAUNCH.match(line).groups()[:3] for line in launches(lines)] == [
        ("permute_rows", "3", "256"),
        ("permute_rows", "2", "256"),
        ("permute_int8_f16", "9", "32"),
        ("permute_int8_f16", "9", "128"),
        ("permute_fp8_row_f16", "9", "32"),
        ("permute_fp8_g128_f16", "8", "256"),
        ("permute_fp8_g128_f16", "3", "256"),
        ("dequantize_rows_f16", "9", "256"),
        ("combine_bf16", "6", "128"),
    ]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("permute", {"width_bytes": 24}, "17 rows of width 24, which must be a multiple of 16"),
        ("permute", {"rows": 0}, "rows, output or scales is null"),
        ("permute_int8", {"width": 16392}, "width 16392 is over 16384"),
        ("permute_int8", {"dtype": 2}, "dtype 2 is neither fp16 nor bf16"),
        ("permute_fp8", {"width": 16392}, "width 16392 is over 16384"),
        ("permute_fp8", {"group_size": 64}, "group_size 64 is neither 128 nor 0"),
        (
            "permute_fp8",
            {"num_rows": 2**30, "width": 4096, "group_size": 128},
            "1073741824 rows of width 4096 are too many",
        ),
        ("permute_fp8", {"scales": 0}, "rows, output or scales is null"),
        ("dequantize_rows", {"scales": 0}, "rows, output or scales is null"),
    ],
)
def test_rows_that_are_refused(
    host_library: Path, fake_driver: Path, kernels: Path, name: str, changes: dict, said: str
) -> None:
    own = {"width_bytes": 64} if name == "permute" else {"width": 64, "scales": 16, "dtype": 0}
    own |= {"group_size": 0} if name == "permute_fp8" else {}
    common = {"rows": 16, "row_index": 16, "output": 16, "num_rows": 17, "max_ctas": 0, "stream": 7}

    lines = call(
        host_library, fake_driver, opened(kernels), BIND, (name, [], common | own | changes)
    )

    assert launches(lines) == []
    assert lines[-1].startswith(f"{name}: 4 {name}: ")
    assert said in lines[-1]


POINTERS = ("heads", "cos", "sin", "cache_rows", "query", "keys", "values")
ROTARY_CACHE = dict.fromkeys(POINTERS, 16) | {
    "query_weight": 0,
    "key_weight": 0,
    "table_stride": 256,
    "epsilon": 1e-5,
    "sizes": [3, 32, 8, 128],
    "dtype": 1,
    "stream": 7,
}
ADD_NORM = dict.fromkeys(("hidden", "addend", "weight", "sum", "normed"), 16) | {
    "epsilon": 1e-5,
    "num_rows": 5,
    "width": 4096,
    "dtype": 1,
    "stream": 7,
}


@pytest.mark.parametrize(
    ("changes", "name", "grid"),
    [
        ({}, "rotary_cache_bf16", 18),  # two heads a warp
        ({"dtype": 0, "query_weight": 16, "key_weight": 16}, "rotary_cache_f16", 18),
        ({"sizes": [1, 1, 1, 8]}, "rotary_cache_bf16", 1),
        ({"sizes": [1, 43, 43, 8]}, "rotary_cache_bf16", 2),  # one head a lane
        ({"sizes": [5, 2, 1, 40]}, "rotary_cache_bf16", 2),  # 5 of 8 lanes work
        ({"sizes": [5, 2, 1, 576]}, "rotary_cache_bf16", 5),  # one head a warp
    ],
)
def test_heads_are_dealt_to_lanes(
    host_library: Path, fake_driver: Path, kernels: Path, changes: dict, name: str, grid: int
) -> None:
    wanted = ("rotary_cache", [], ROTARY_CACHE | changes)

    assert one_launch(host_library, fake_driver, kernels, wanted) == (name, grid, 128, 0)


@pytest.mark.parametrize(
    ("changes", "name", "threads"),
    [
        ({}, "add_norm_bf16", 512),
        ({"dtype": 0}, "add_norm_f16", 512),
        ({"width": 8}, "add_norm_bf16", 32),
        ({"width": 264}, "add_norm_bf16", 64),
        ({"width": 8192}, "add_norm_bf16", 1024),
        ({"width": 16384}, "add_norm_bf16", 1024),
    ],
)
def test_a_cta_norms_a_row(
    host_library: Path, fake_driver: Path, kernels: Path, changes: dict, name: str, threads: int
) -> None:
    wanted = ("add_norm", [], ADD_NORM | changes)

    assert one_launch(host_library, fake_driver, kernels, wanted) == (name, 5, threads, 0)


def test_rows_of_a_layer_start_while_the_kernel_before_them_ends(
    host_library: Path, fake_driver: Path, kernels: Path
) -> None:
    calls: list[Call] = [("rotary_cache", [], ROTARY_CACHE), ("add_norm", [], ADD_NORM)]

    lines = call(host_library, fake_driver, opened(kernels), BIND, *calls, FAKE_CAPABILITY=90)

    assert [line.partition("stream")[2] for line in launches(lines)] == [
        f" 7 attributes {OVERLAPPED}"
    ] * 2


@pytest.mark.parametrize(
    ("name", "nothing"),
    [("rotary_cache", {"sizes": [0, 32, 8, 128]}), ("add_norm", {"num_rows": 0})],
)
def test_no_rows_are_no_launch(
    host_library: Path, fake_driver: Path, kernels: Path, name: str, nothing: dict
) -> None:
    arguments = ROTARY_CACHE if name == "rotary_cache" else ADD_NORM

    lines = call(host_library, fake_driver, opened(kernels), BIND, (name, [], arguments | nothing))

    assert launches(lines) == []
    assert lines[-1] == f"{name}: 0"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("rotary_cache", {"sizes": [3, 32, 8, 12]}, "width 12, table_stride 256; the width must"),
        ("rotary_cache", {"sizes": [3, 32, 0, 128]}, "3 tokens of 32 heads and 0 of keys"),
        ("rotary_cache", {"table_stride": 130}, "table_stride 130; the width must"),
        ("rotary_cache", {"query_weight": 16}, "one of query_weight and key_weight is null"),
        ("rotary_cache", {"dtype": 2}, "dtype 2 is neither fp16 nor bf16"),
        ("rotary_cache", {"cache_rows": 0}, "an input or output is null"),
        ("rotary_cache", {"sizes": [2**28, 32, 8, 8]}, "12884901888 heads of width 8 are too many"),
        ("add_norm", {"width": 12}, "5 rows of width 12, which must be a multiple of 8"),
        ("add_norm", {"num_rows": -1}, "-1 rows of width 4096"),
        ("add_norm", {"dtype": 2}, "dtype 2 is neither fp16 nor bf16"),
        ("add_norm", {"addend": 0}, "an input or output is null"),
    ],
)
def test_rows_of_a_layer_that_are_refused(
    host_library: Path, fake_driver: Path, kernels: Path, name: str, changes: dict, said: str
) -> None:
    arguments = ROTARY_CACHE if name == "rotary_cache" else ADD_NORM

    lines = call(host_library, fake_driver, opened(kernels), BIND, (name, [], arguments | changes))

    assert launches(lines) == []
    assert lines[-1].startswith(f"{name}: 4 {name}: ")
    assert said in lines[-1]
