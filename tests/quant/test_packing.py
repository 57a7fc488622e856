"""The blob of an expert: what is written comes back through the views, and nothing is padded."""

from __future__ import annotations

import pytest
import torch

from lightmoe.quant.packing import ExpertLayout


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
