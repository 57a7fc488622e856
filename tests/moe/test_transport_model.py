"""The choice of the transport: predictions near measured times, and what decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.moe import transport_model
from lightmoe.moe.transport_model import (
    HOST_SECONDS,
    START_SECONDS,
    ExchangeShape,
    Way,
    choose_transport,
    exchange_matrices,
    predict,
    ways_on,
)
from lightmoe.topology import Topology, read_topology
from tests.topology.machines import GB, box, link, linked

IPC, HOST, NCCL = Way("copy_engine", "ipc"), Way("copy_engine", "host"), Way("nccl")
MIXTRAL = ExchangeShape(num_experts=8, num_experts_per_token=2, width=4096, element_bytes=2)
QWEN3 = ExchangeShape(num_experts=128, num_experts_per_token=8, width=2048, element_bytes=2)
FILES = Path(__file__).resolve().parents[2] / "topology"


def file(name: str) -> Topology:
    return read_topology(FILES / f"{name}.toml")


def without_nvlink(topology: Topology) -> Topology:
    return replace(topology, fabrics=(), name=f"{topology.name}, no P2P")


@pytest.mark.parametrize(
    ("way", "shape", "measured_ms"),
    [(IPC, MIXTRAL, 0.806), (IPC, QWEN3, 1.152), (HOST, MIXTRAL, 9.596)],
    ids=str,
)
def test_predictions_near_what_was_measured(
    way: Way, shape: ExchangeShape, measured_ms: float
) -> None:
    """`comm_ms` at 8192 tokens a rank of benchmarks/results/moe-layer-ep-*-4x-nvidia-h200."""
    machine = file("4xh200-nvlink")
    machine = machine if way == IPC else without_nvlink(machine)
    predicted = predict(machine, way, shape, [8192] * 4).total
    assert predicted * 1e3 == pytest.approx(measured_ms, rel=0.2)


def test_the_costs_by_hand() -> None:
    shape = ExchangeShape(num_experts=4, num_experts_per_token=1, width=1000, element_bytes=2)
    nvlink = linked()  # 100 GB/s a rank and direction, 10 us
    tokens = [1e6] * 4
    row_bytes, sent = 2000, 3 * 1e6 / 4  # one expert a rank: three of four rows travel
    dispatch = sent * row_bytes / (100 * GB)
    times = predict(nvlink, IPC, shape, tokens)
    assert times.dispatch == pytest.approx(START_SECONDS["copy_engine"] + dispatch)
    assert times.combine == pytest.approx(times.dispatch)
    by_nccl = predict(nvlink, NCCL, shape, tokens)
    assert by_nccl.dispatch == pytest.approx(START_SECONDS["nccl"] + 10e-6 + dispatch)
    choice = 3 * 1e6 * 2 / (100 * GB)
    assert by_nccl.choice == pytest.approx(START_SECONDS["nccl"] + HOST_SECONDS + 10e-6 + choice)
    assert times.total == times.choice + times.dispatch + times.combine


def test_through_the_host_every_byte_goes_up_once_and_down_to_each() -> None:
    shape = ExchangeShape(num_experts=4, num_experts_per_token=1, width=1000, element_bytes=2)
    machine = (
        box()
    )  # memory of a socket: 40 GB/s, both directions; cards and uplinks 12 up, 10 down
    tokens = [1e6] * 4
    times = predict(machine, HOST, shape, tokens)
    # All rows of a switch's two cards pass its uplink; 3/4 of them come to each card.
    upload, pull = 2 * 1e6 * 2000 / (12 * GB), 2 * 0.75e6 * 2000 / (10 * GB)
    assert times.dispatch == pytest.approx(START_SECONDS["copy_engine"] + 5e-6 + upload + pull)
    # One result a token, uploaded where it was computed, also for the rank's own tokens.
    assert times.combine == pytest.approx(times.dispatch)


def test_nothing_is_exchanged_by_one_rank_or_without_tokens() -> None:
    assert predict(linked(), NCCL, MIXTRAL, [0, 0, 0, 0]).total == 0
    assert predict(linked().first(1), IPC, MIXTRAL, [100]).total == 0


@given(st.lists(st.integers(0, 10_000), min_size=4, max_size=4), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_bytes_are_those_of_distinct_ranks_and_all_pairs(tokens: list[int], per_token: int) -> None:
    shape = ExchangeShape(num_experts=8, num_experts_per_token=per_token, width=16, element_bytes=2)
    choice, rows, results = exchange_matrices(shape, tokens)
    for matrix in (choice, rows, results):
        assert matrix.trace() == 0
    # A token never has more rows than pairs, nor more than one for each other rank.
    assert (rows <= results.T + 1e-6).all()
    assert rows.sum() <= 3 * sum(tokens) * 32
    assert results.sum() == pytest.approx(sum(tokens) * per_token * 3 / 4 * 32)


def test_which_ways_a_machine_has() -> None:
    assert ways_on(file("cpu-10")) == (Way("gloo"),)
    assert ways_on(linked()) == (IPC, HOST, NCCL)
    assert ways_on(box()) == (HOST, NCCL)
    assert ways_on(box(((0, 1, 2, 3),))) == (IPC, HOST, NCCL)
    assert ways_on(box(((0, 1), (2, 3)))) == (HOST, NCCL)
    assert ways_on(linked().first(1)) == ()


def test_the_cards_own_memory_wins_over_nvlink_and_the_numbers_are_said() -> None:
    machine = file("8xh200-nvlink")
    choice = choose_transport(
        machine, ways_on(machine), MIXTRAL, prefill_tokens=8192, decode_tokens=16
    )
    assert choice.way == IPC
    assert [one.way for one in choice.predictions] == [IPC, HOST, NCCL]
    for one in choice.predictions:
        said = f"{one.way.label} {one.prefill_seconds * 1e3:.2f} / {one.decode_seconds * 1e3:.2f}"
        assert said in choice.reason
    assert "8xh200-nvlink, 8192 / 16 tokens a rank" in choice.reason
    assert "alone" not in choice.reason


def test_a_slow_way_between_cards_loses_to_the_host() -> None:
    """P2P over a narrow switch, wide roads to the host: figures decide, not what is offered."""
    machine = box(((0, 1, 2, 3),))
    slow = replace(
        machine,
        fabrics=(replace(linked().fabrics[0], bytes_per_second=1 * GB),),
        links={**machine.links, "x16": link("x16", 40, 40, 5e-6)},
    )
    choice = choose_transport(slow, ways_on(slow), MIXTRAL, prefill_tokens=8192, decode_tokens=64)
    assert choice.way == HOST


@pytest.mark.parametrize(
    ("decode_tokens", "taken", "said"),
    [(16, HOST, True), (192, NCCL, True), (512, NCCL, False)],
    ids=["answers weigh more", "prompts weigh more", "both alike"],
)
def test_where_phases_differ_the_longer_one_decides(
    decode_tokens: int, taken: Way, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts go faster by nccl here, small steps by copy_engine; the more sequences share a step,
    the less it weighs in a request."""
    monkeypatch.setattr(transport_model, "NCCL_HOST_SHARE", 1.0)
    monkeypatch.setattr(transport_model, "HIDDEN_SHARE", 0.25)
    choice = choose_transport(
        box(), ways_on(box()), MIXTRAL, prefill_tokens=8192, decode_tokens=decode_tokens
    )
    host, nccl = choice.predictions
    assert nccl.prefill_seconds < (1 - transport_model.HIDDEN_SHARE) * host.prefill_seconds
    assert (host.decode_seconds < nccl.decode_seconds) == said
    assert choice.way == taken
    assert ("prompts alone would take nccl, answers copy_engine (host)" in choice.reason) == said


def test_equal_ways_go_to_the_first() -> None:
    choice = choose_transport(linked(), (NCCL, NCCL), MIXTRAL, prefill_tokens=64, decode_tokens=4)
    assert choice.way is choice.predictions[0].way


@given(tokens=st.integers(1, 1 << 16))
@settings(max_examples=30, deadline=None)
def test_the_choice_is_the_same_for_the_same_numbers_and_never_worse_in_both(tokens: int) -> None:
    machine = file("10x2080ti-pcie")
    first, second = (
        choose_transport(machine, ways_on(machine), QWEN3, prefill_tokens=tokens, decode_tokens=8)
        for _ in range(2)
    )
    assert first == second
    mine = next(one for one in first.predictions if one.way == first.way)
    hidden = 1 - transport_model.HIDDEN_SHARE
    for other in first.predictions:
        exposed = mine.prefill_seconds * hidden
        assert not (other.prefill_seconds < exposed and other.decode_seconds < mine.decode_seconds)
