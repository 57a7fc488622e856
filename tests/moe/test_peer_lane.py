"""What a lane keeps for the layers of a step, without a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
from torch import Tensor

from lightmoe.distributed.peers import Road
from lightmoe.moe.dispatch import peer_lane
from lightmoe.moe.dispatch.arena import ArenaLayout
from lightmoe.moe.dispatch.peer_lane import PeerLane
from lightmoe.moe.multiprocessors import Multiprocessors
from lightmoe.moe.overlap_model import chunk_of
from tests.moe.emulated_ranks import open_lanes

LAYOUT = ArenaLayout(
    num_ranks=3, max_tokens=16, num_experts=4, num_experts_per_token=2, width=8, element_bytes=2
)
TOKENS = (7, 0, 16)


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> PeerLane:
    """The last rank's."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    return open_lanes(LAYOUT, "ipc")[2]


@pytest.mark.parametrize("road", ["ipc", "host"])
@pytest.mark.parametrize("num_chunks", [1, 2, 5])
def test_the_chunks_of_a_step_have_all_tokens_and_rows_of_their_own(
    monkeypatch: pytest.MonkeyPatch, road: Road, num_chunks: int
) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    lane = open_lanes(LAYOUT, road)[2]
    chunks = lane.step(TOKENS, num_chunks, TOKENS[2], False).chunks

    for number, chunk in enumerate(chunks):
        spans = [chunk_of(tokens, number, num_chunks) for tokens in TOKENS]
        assert chunk.begins == [span.start for span in spans]
        assert chunk.counts == [span.stop - span.start for span in spans]
        assert chunk.tokens == spans[2]
        assert chunk.num_pairs == 2 * sum(chunk.counts) == len(chunk.rows)
        assert 3 * chunk.expected_pairs >= chunk.num_pairs > 3 * (chunk.expected_pairs - 1)
        assert chunk.own_prefixes == lane.prefixes[number, 2].data_ptr()
        assert (chunk.dispatch_ctas, chunk.combine_ctas) == (
            lane.exchange_ctas if number else 0,
            lane.exchange_ctas if road == "host" and number + 1 < num_chunks else 0,
        )
    for one, other in pairwise(chunks):
        end = one.rows.data_ptr() + one.rows.numel() * one.rows.element_size()
        assert end == other.rows.data_ptr()


@pytest.mark.parametrize("road", ["ipc", "host"])
def test_a_lane_has_the_exchange_s_part_of_the_card_by_its_road(
    monkeypatch: pytest.MonkeyPatch, road: Road
) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    parts = {"ipc": Multiprocessors(12, 56), "host": Multiprocessors(5, 63)}
    monkeypatch.setattr(peer_lane, "multiprocessors_of", lambda _, road: parts[road])
    assert {lane.exchange_ctas for lane in open_lanes(LAYOUT, road)} == {parts[road].exchange}


def test_all_layers_of_a_step_share_its_chunks(lane: PeerLane) -> None:
    step = lane.step(TOKENS, 2, 16, False)

    assert lane.step(TOKENS, 2, 16, False) is step
    (padded,) = lane.step((1, 1, 1), 1, 4, True).chunks
    assert padded.tokens == slice(0, 4)
    assert padded.dispatch_ctas == padded.combine_ctas == lane.exchange_ctas
    assert lane.step(TOKENS, 2, 16, False) is not step


def test_what_layers_find_out_of_a_step_is_theirs_who_hold_as_many_experts(lane: PeerLane) -> None:
    step, asked = lane.step(TOKENS, 2, 16, False), []

    def tokens_per_tile(num_pairs: int, num_groups: int) -> int:
        asked.append((num_pairs, num_groups))
        return 8 * num_groups

    first, again = (step.to_split("even", 2, tokens_per_tile) for _ in range(2))
    none_held, _ = step.to_split("even", 0, tokens_per_tile)

    sizes = [(chunk.expected_pairs, 2) for chunk in step.chunks]
    assert first == ([("even", 16, chunk.num_pairs) for chunk in step.chunks], sizes)
    assert again is first
    assert asked == [*sizes, *((num_pairs, 1) for num_pairs, _ in sizes)]
    assert [tokens for _, tokens, _ in none_held] == [8, 8]
    assert step.to_split("none", 2, tokens_per_tile) is not first
