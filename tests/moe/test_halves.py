"""The multiprocessors of two halves' products, without a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from lightmoe.moe import halves
from lightmoe.moe.overlap_model import Overlap


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("has_beside", [True, False])
def test_products_share_the_device_only_where_one_runs_beside_the_other(
    waits: bool, has_beside: bool
) -> None:
    """The first half's second product beside the second half's first one."""
    overlap = Overlap(halves_from=2, expert_ctas=128, up_share=2 / 3)
    experts = mock.Mock()
    experts.outpace.return_value = waits
    dispatcher = mock.Mock(stream=None, beside=mock.Mock() if has_beside else None)
    hidden: Any = SimpleNamespace(is_cuda=True, device=None)

    @contextlib.contextmanager
    def on_stream(stream: object, current: object) -> Any:
        yield

    with (
        mock.patch.object(halves, "follow"),
        mock.patch.object(halves, "on_stream", on_stream),
        mock.patch.object(torch.cuda, "current_stream"),
    ):
        for half in (0, 1):
            flight = halves.InFlight(
                0, dispatcher, hidden, mock.Mock(), mock.Mock(), half, mock.Mock(), None
            )
            halves.compute(flight, experts, overlap)

    ups, downs = (
        [call.kwargs["max_ctas"] for call in product.call_args_list]
        for product in (experts.up, experts.down)
    )
    shared = waits and has_beside
    assert ups == [128, 85 if shared else 128]
    assert downs == [43 if shared else 128, 128]
