"""What the exchange and the experts have of a card, by the road between cards."""

from __future__ import annotations

import pytest
import torch

from lightmoe.moe import multiprocessors
from lightmoe.moe.multiprocessors import (
    HOST_CTAS,
    Multiprocessors,
    multiprocessors_of,
    overlap_beside,
)
from lightmoe.moe.overlap_model import Overlap


@pytest.mark.parametrize(("count", "exchange"), [(132, 24), (68, 12), (2, 1)])
def test_over_links_the_exchange_has_a_share_that_only_products_of_claimed_tiles_have_too(
    count: int, exchange: int
) -> None:
    claimed = Multiprocessors.of(count, "ipc", claims_tiles=True)
    fixed = Multiprocessors.of(count, "ipc", claims_tiles=False)
    assert (claimed.exchange, claimed.experts) == (exchange, count)
    assert (fixed.exchange, fixed.experts) == (exchange, count - exchange)


@pytest.mark.parametrize("claims_tiles", [False, True])
@pytest.mark.parametrize("count", [4, 68, 132])
def test_through_the_host_the_exchange_has_as_many_on_any_card(
    count: int, claims_tiles: bool
) -> None:
    shares = Multiprocessors.of(count, "host", claims_tiles=claims_tiles)
    assert (shares.exchange, shares.experts) == (HOST_CTAS, max(1, count - HOST_CTAS))
    # By arithmetic: more than over links, where the second product waits.
    assert shares.up_share > Multiprocessors.of(count, "ipc", claims_tiles=True).up_share


def test_without_a_card_each_has_one() -> None:
    assert multiprocessors_of(torch.device("cpu"), "host") == Multiprocessors(1, 1)


def test_products_have_the_experts_part_of_a_card_and_all_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_road = {"host": Multiprocessors(4, 60, 0.7), "ipc": Multiprocessors(12, 56, 0.6)}
    monkeypatch.setattr(multiprocessors, "multiprocessors_of", lambda _, road: of_road[road])
    card = torch.device("cuda")
    assert overlap_beside(card, "host") == Overlap(expert_ctas=60, up_share=0.7)
    assert overlap_beside(card) == Overlap(expert_ctas=56, up_share=0.6)
    assert overlap_beside(torch.device("cpu"), "host") == Overlap()
