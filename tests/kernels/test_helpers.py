"""Which products a helper takes part in, with what, and behind what, without a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from lightmoe.kernels import helpers
from lightmoe.kernels.helpers import Helper, Helpers
from lightmoe.kernels.products import Plan
from lightmoe.kernels.tiles import candidates

wrapper = importlib.import_module("lightmoe.kernels.grouped_gemm")  # the package's is a function
HOPPER, AMPERE = candidates(90, 16)[0], candidates(80, 16)[0]
OWN, OTHER = mock.Mock(name="own stream"), mock.Mock(name="other stream")
OWN_TICKET = torch.zeros(1, dtype=torch.int32)


@pytest.fixture
def calls() -> Iterator[mock.Mock]:
    """Launches, and the records and waits of events, in their order."""
    calls = mock.Mock()
    with (
        mock.patch.object(wrapper, "library", return_value=calls.library),
        mock.patch.object(helpers, "library", return_value=calls.library),
        mock.patch.object(wrapper, "unit_ticket", return_value=OWN_TICKET),
        mock.patch.object(torch.cuda, "Event", return_value=calls.event),
    ):
        yield calls


def multiply(helper: Helper | None, **changes: Any) -> None:
    rows, weights, output = torch.zeros(3, 16), torch.zeros(1, 8, 16), torch.zeros(3, 8)
    tile = changes.pop("tile", HOPPER)
    wrapper.launch_product(
        (0, 0, 0, 0, 1, 3),
        Plan(tile, tile.fields),
        rows.half(),
        weights.half(),
        output.half(),
        swiglu=False,
        helper=helper,
        **({"max_ctas": 60} | changes),
    )


def test_a_helper_is_the_same_launch_turned_round(calls: mock.Mock) -> None:
    ticket = torch.zeros(1, dtype=torch.int32)
    helper = Helper(72, ticket, OWN)
    multiply(helper)
    helper.launch(OTHER)

    names = [call[0] for call in calls.mock_calls]
    assert names == ["event.record", "library.launch", "event.wait", "library.launch"]
    calls.event.record.assert_called_once_with(OWN)
    calls.event.wait.assert_called_once_with(OTHER)
    own, help_ = (call.kwargs for call in calls.library.launch.call_args_list)
    own |= dict(zip(("stem", "device"), calls.library.launch.call_args_list[0].args, strict=True))
    differs = {name: (own[name], help_[name]) for name in own if own[name] != help_[name]}
    shared = {"max_ctas": (60, 72), "other_ctas": (72, 60), "helps": (False, True)}
    assert own.keys() == help_.keys()
    assert differs == shared
    assert own["unit_ticket"] == ticket.data_ptr()


@pytest.mark.parametrize(
    ("max_ctas", "changes"),
    [(None, {}), (0, {}), (72, {"max_ctas": None}), (72, {"tile": AMPERE})],
    ids=str,
)
def test_where_nothing_can_be_left_a_helper_does_nothing(
    calls: mock.Mock, max_ctas: int | None, changes: dict[str, Any]
) -> None:
    helper = Helper(max_ctas, torch.zeros(1, dtype=torch.int32), OWN)
    multiply(helper, **changes)
    alone = calls.library.launch.call_args_list
    multiply(None, **changes)
    helper.launch(OTHER)

    assert [call[0] for call in calls.mock_calls] == ["library.launch"] * 2
    for launched in alone:
        assert (launched.kwargs["other_ctas"], launched.kwargs["helps"]) == (0, False)
        assert launched.kwargs["unit_ticket"] in (0, OWN_TICKET.data_ptr())


def test_every_helper_has_a_ticket_of_its_own() -> None:
    tickets = torch.zeros(8, dtype=torch.int32)
    with mock.patch.object(helpers, "shared_tickets", return_value=tickets) as shared:
        made = Helpers(torch.device("cuda", 0), 4)
        addresses = {made.of(10, OWN).ticket.data_ptr() for _ in range(4)}
    shared.assert_called_once_with(4, torch.device("cuda", 0))
    assert len(addresses) == 4
