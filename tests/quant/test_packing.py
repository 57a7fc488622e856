"""The blob of an expert: what is written comes back through the views, quantised or not."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.quant.packing import ExpertLayout, QuantizedExpertLayout
from lightmoe.quant.quantize import dequantize, quantize_groups


@pytest.mark.parametrize(("width", "expert_width"), [(4, 6), (7, 3), (16, 16), (1, 1)])
def test_written_experts_come_back_through_the_views(width: int, expert_width: int) -> None:
    layout = ExpertLayout(width, expert_width)
    generator = torch.Generator().manual_seed(0)
    parts = [
        (
            torch.randn(expert_width, width, generator=generator),
            torch.randn(expert_width, width, generator=generator),
            torch.randn(width, expert_width, generator=generator),
        )
        for _ in range(3)
    ]
    blobs = torch.full((3, layout.num_elements), float("nan"))

    for blob, (gate, up, down) in zip(blobs, parts, strict=True):
        layout.write(blob, gate, up, down)

    gate_up_view, down_view = layout.views(blobs)
    for slot, (gate, up, down) in enumerate(parts):
        assert torch.equal(gate_up_view[slot], torch.cat([gate, up]))
        assert torch.equal(down_view[slot], down)
        assert torch.equal(blobs[slot], torch.cat([gate.flatten(), up.flatten(), down.flatten()]))


def test_views_share_memory_with_the_blobs() -> None:
    blobs = torch.zeros(2, ExpertLayout(4, 6).num_elements)

    gate_up, down = ExpertLayout(4, 6).views(blobs)
    gate_up[1] = 1.0
    down[0] = 2.0

    assert blobs[0].sum() == 2.0 * 24
    assert blobs[1].sum() == 48


def quantized_layouts() -> list[QuantizedExpertLayout]:
    return [
        QuantizedExpertLayout(width, expert_width, num_bits, group_size, symmetric, dtype)
        for width, expert_width in ((64, 48), (40, 24), (13, 7))
        for num_bits, group_size in ((4, 32), (4, 128), (8, 64))
        for symmetric in (True, False)
        for dtype in (torch.float16, torch.bfloat16)
    ]


def random_expert(layout: QuantizedExpertLayout, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width, expert_width = layout.hidden_size, layout.expert_size
    gate, up = torch.randn(2, expert_width, width, generator=generator)
    return gate, up, torch.randn(width, expert_width, generator=generator)


@pytest.mark.parametrize("layout", quantized_layouts(), ids=str)
def test_quantised_experts_come_back_through_the_views(layout: QuantizedExpertLayout) -> None:
    blobs = torch.full((3, layout.num_elements), 255, dtype=torch.uint8)
    experts = [random_expert(layout, seed) for seed in range(3)]

    for blob, expert in zip(blobs, experts, strict=True):
        layout.write(blob, *expert)

    form = (layout.num_bits, layout.group_size)
    views = layout.views(blobs)
    for slot, (gate, up, down) in enumerate(experts):
        for matrix, weight in zip(views, (torch.cat([gate, up]), down), strict=True):
            parts = quantize_groups(weight, *form, symmetric=layout.symmetric, dtype=layout.dtype)
            assert torch.equal(matrix.dense(slot), dequantize(*parts, *form))


@pytest.mark.parametrize("layout", quantized_layouts(), ids=str)
def test_every_part_of_a_blob_is_aligned_and_no_part_meets_another(
    layout: QuantizedExpertLayout,
) -> None:
    blobs = torch.zeros(2, layout.num_elements, dtype=torch.uint8)
    base = blobs.data_ptr()
    assert layout.num_elements % 128 == 0
    parts = [
        part
        for matrix in layout.views(blobs)
        for part in (matrix.packed, matrix.scales, matrix.zeros)
        if part is not None
    ]
    assert len(parts) == (4 if layout.symmetric else 6)

    spans = [(part[0].data_ptr() - base, part[0].nbytes) for part in parts]
    for begin, _ in spans:
        assert begin % 128 == 0
    for part in parts:
        assert part[0].is_contiguous()
        assert part[1].data_ptr() - part[0].data_ptr() == layout.num_elements
    for (begin, num_bytes), (following, _) in pairwise([*spans, (layout.num_elements, 0)]):
        assert begin + num_bytes <= following


def test_the_bytes_of_a_mixtral_expert_are_a_quarter_and_its_scales() -> None:
    layout = QuantizedExpertLayout(4096, 14336, 4, 128, symmetric=True, dtype=torch.float16)

    num_weights = 3 * 4096 * 14336
    assert layout.num_elements == num_weights // 2 + num_weights // 128 * 2


def test_a_matrix_of_another_layout_is_refused() -> None:
    layout = QuantizedExpertLayout(64, 32, 4, 32, symmetric=True, dtype=torch.float16)
    other = QuantizedExpertLayout(64, 32, 4, 64, symmetric=True, dtype=torch.float16)
    blob = torch.zeros(layout.num_elements, dtype=torch.uint8)
    matrices = other.views(torch.zeros(1, other.num_elements, dtype=torch.uint8))

    with pytest.raises(UsageError, match="gate_up is 2 x 32 x 64 int4g64 symmetric float16; .*g32"):
        layout.write_packed(blob, *matrices)


def test_a_layout_that_no_kernel_takes_is_refused() -> None:
    with pytest.raises(UsageError, match="num_bits is 5"):
        QuantizedExpertLayout(64, 32, 5, 32, symmetric=True, dtype=torch.float16)
