"""Floors: the published figures for three models on three cards, and the definitions."""

from __future__ import annotations

import pytest
from floors import (
    SHAPES,
    Work,
    expected_active,
    floor,
    instruction_of,
    layer_work,
    path_of,
    product_work,
)

H100 = (798e12, 3.0e12)
H200 = (788e12, 4.3e12)
TURING = (53.8e12, 0.616e12)
TURING_HALF = (107e12, 0.616e12)

# shape, T, active experts, GFLOP, MB of bf16, MB of int4
WORK = [
    ("mixtral", 1, 2.0, 0.70, 705, 182),
    ("mixtral", 64, 8.0, 45.10, 2820, 728),
    ("mixtral", 16384, 8.0, 11544.87, 3088, 996),
    ("dsv2lite", 16, 50.8, 1.66, 878, 227),
    ("dsv2lite", 1024, 64.0, 106.30, 1116, 294),
    ("qwen3", 1, 8.0, 0.08, 76, 19),
    ("qwen3", 64, 125.9, 4.83, 1189, 307),
    ("qwen3", 4096, 128.0, 309.24, 1244, 347),
]
# shape, T, dtype, card, microseconds and what bounds
FLOORS = [
    ("mixtral", 1, "bf16", H100, 234.9, "memory"),
    ("mixtral", 64, "bf16", H100, 939.9, "memory"),
    ("mixtral", 4096, "bf16", H100, 3617, "compute"),
    ("mixtral", 256, "int4", H100, 243.6, "memory"),
    ("mixtral", 256, "int4", H200, 228.9, "compute"),
    ("dsv2lite", 16, "bf16", H100, 292.7, "memory"),
    ("dsv2lite", 4096, "int4", H200, 539.6, "compute"),
    ("dsv2lite", 1, "fp16", TURING, 168.5, "memory"),
    ("qwen3", 64, "bf16", H100, 396.4, "memory"),
    ("qwen3", 1024, "int4", TURING_HALF, 722.5, "compute"),
    ("qwen3", 16384, "bf16", H200, 1570, "compute"),
]


@pytest.mark.parametrize(("name", "tokens", "active", "gflop", "bf16", "int4"), WORK)
def test_work_of_three_models(
    name: str, tokens: int, active: float, gflop: float, bf16: float, int4: float
) -> None:
    shape = SHAPES[name]
    expected = expected_active(shape, tokens)
    assert expected == pytest.approx(active, abs=0.051)
    work = layer_work(shape, tokens, expected, "bf16")
    assert work.flops / 1e9 == pytest.approx(gflop, abs=0.0051)
    assert work.num_bytes / 1e6 == pytest.approx(bf16, abs=0.51)
    assert layer_work(shape, tokens, expected, "int4").num_bytes / 1e6 == pytest.approx(
        int4, abs=0.51
    )


@pytest.mark.parametrize(("name", "tokens", "dtype", "card", "microseconds", "bound"), FLOORS)
def test_floor_of_three_cards(
    name: str, tokens: int, dtype: str, card: tuple[float, float], microseconds: float, bound: str
) -> None:
    shape = SHAPES[name]
    least = floor(layer_work(shape, tokens, expected_active(shape, tokens), dtype), *card)
    assert 1e3 * least.ms == pytest.approx(microseconds, rel=1e-3, abs=0.051)
    assert least.bound == bound


def test_measured_experts_count_and_not_the_expected_ones() -> None:
    shape = SHAPES["qwen3"]
    one, two = (layer_work(shape, 64, active, "bf16").num_bytes for active in (10, 20))
    assert two - one == 10 * 3 * 2048 * 768 * 2


def test_the_two_products_do_the_layers_flops() -> None:
    shape = SHAPES["dsv2lite"]
    tokens, pairs = 100, 600
    up = product_work(pairs, tokens, 64, shape.hidden_size, shape.expert_size, "bf16", swiglu=True)
    down = product_work(pairs, pairs, 64, shape.expert_size, shape.hidden_size, "bf16", False)
    assert up.flops + down.flops == layer_work(shape, tokens, 64, "bf16").flops
    weights = 64 * shape.num_weights * 2
    assert up.num_bytes + down.num_bytes > weights
    assert down.num_bytes == weights / 3 + 2 * pairs * (shape.expert_size + shape.hidden_size)


def test_floor_is_the_larger_term() -> None:
    assert floor(Work(2e12, 1e9), 1e12, 1e12).ms == 2000
    assert floor(Work(1e9, 3e12), 1e12, 1e12).bound == "memory"
    assert Work(6.0, 2.0).intensity == 3.0


def test_a_path_is_measured_by_its_own_instruction() -> None:
    assert path_of("75ptx", 90) == path_of(None, 75) == path_of("75", 75) == "sm75"
    assert path_of(None, 86) == path_of("80", 80) == path_of("80ptx", 90) == "sm80"
    assert path_of(None, 90) == path_of("90", 90) == "sm90"
    assert instruction_of("fp16", "sm75") == "half_k8"
    assert instruction_of("fp16", "sm80") == "half_k16"
    assert instruction_of("bf16", "sm80") == "bfloat_k16"
    assert instruction_of("bf16", "sm90") == "wgmma_bf16"
