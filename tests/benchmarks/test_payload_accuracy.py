"""What copy_engine's ranks answer when they give sums, as they are or as int8, is what the bench of
their accuracy emulates, bit by bit; and what they count as sent is the formula.
"""

from __future__ import annotations

import ctypes
from functools import partial

import pytest
import torch
from payload_accuracy import SummingDispatcher, equal_beginning
from torch import Tensor

from lightmoe.distributed.peers import Road
from lightmoe.errors import UsageError
from lightmoe.kernels import exchange as exchange_module
from lightmoe.moe.dispatch import LocalDispatcher
from lightmoe.moe.dispatch.arena import ArenaLayout
from lightmoe.moe.placement import initial_placement
from tests.moe.cases import LayerWeights, poison_results
from tests.moe.emulated_ranks import (
    CPU,
    DTYPE,
    HostLibrary,
    compile_kernels,
    layer_of,
    on_threads,
    open_lanes,
)

NUM_RANKS, NUM_EXPERTS, PER_TOKEN, WIDTH, MAX_TOKENS = 3, 8, 3, 48, 23
WEIGHTS = LayerWeights.random(0, NUM_EXPERTS, PER_TOKEN, WIDTH, 32)
MODES = pytest.mark.parametrize(
    ("summed", "as_int8"), [(False, False), (True, False), (True, True)], ids=str
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_kernels(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def _host_library(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    library = HostLibrary(emulated, NUM_RANKS)
    monkeypatch.setattr(exchange_module, "library", lambda: library)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)


def layout(summed: bool, as_int8: bool) -> ArenaLayout:
    return ArenaLayout(
        num_ranks=NUM_RANKS,
        max_tokens=MAX_TOKENS,
        num_experts=NUM_EXPERTS,
        num_experts_per_token=PER_TOKEN,
        width=WIDTH,
        element_bytes=2,
        summed=summed,
        as_int8=as_int8,
    )


def hidden_of(rank: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(num_tokens, WIDTH, generator=generator).to(DTYPE)


@MODES
@pytest.mark.parametrize("road", ["ipc", "host"])
@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_ranks_answer_as_the_bench_emulates(
    road: Road, num_chunks: int, summed: bool, as_int8: bool
) -> None:
    placement = initial_placement(1, NUM_EXPERTS, NUM_RANKS)
    lanes = open_lanes(layout(summed, as_int8), road)
    layers = [
        layer_of(WEIGHTS, placement, rank, [lanes[rank]], num_chunks) for rank in range(NUM_RANKS)
    ]
    alone, group = layer_of(WEIGHTS, initial_placement(1, NUM_EXPERTS, 1), 0)
    homes = torch.tensor([ranks[0] for ranks in placement.copies[0]])
    local = alone.dispatcher
    assert isinstance(local, LocalDispatcher)
    if summed:
        alone.dispatcher = SummingDispatcher(local, homes, as_int8)
    else:
        group.deterministic = True
        alone.dispatcher = LocalDispatcher(group, 0, CPU, alone.experts.tokens_per_tile)
    for tokens in ((7, 0, MAX_TOKENS), (1, 12, 5)):
        hidden = [hidden_of(rank, number) for rank, number in enumerate(tokens)]
        for lane in lanes:
            lane.rows.fill_(float("nan"))
            poison_results(lane)
        for _, one in layers:
            one.tokens_per_rank = tokens

        answers = on_threads([partial(layers[rank][0], rows) for rank, rows in enumerate(hidden)])

        for rows, answer, (one, _) in zip(hidden, answers, layers, strict=True):
            assert torch.equal(answer, alone(rows))
            counted = one.gate(rows).experts.flatten().bincount(minlength=NUM_EXPERTS)
            assert one.load.take().tolist() == [counted.tolist()]


@MODES
def test_ranks_count_what_they_send(summed: bool, as_int8: bool) -> None:
    placement = initial_placement(1, NUM_EXPERTS, NUM_RANKS)
    homes = torch.tensor([ranks[0] for ranks in placement.copies[0]])
    lanes = open_lanes(layout(summed, as_int8), "host")
    layers = [layer_of(WEIGHTS, placement, rank, [lanes[rank]], 2) for rank in range(NUM_RANKS)]
    tokens = (7, 11, 20)
    hidden = [hidden_of(rank, number) for rank, number in enumerate(tokens)]
    for lane, (_, group) in zip(lanes, layers, strict=True):
        assert group.take_bytes_sent() == ()
        lane.count_sent()
        group.tokens_per_rank = tokens

    on_threads([partial(layers[rank][0], rows) for rank, rows in enumerate(hidden)])

    targets = [homes[layers[0][0].gate(rows).experts.long()] for rows in hidden]
    row_bytes = WIDTH + 4 if as_int8 else 2 * WIDTH
    for rank, (_, group) in enumerate(layers):
        wanted = []
        for other in range(NUM_RANKS):
            rows = (targets[rank] == other).any(dim=1).sum()
            here = targets[other] == rank
            results = here.any(dim=1).sum() if summed else here.sum()
            wanted.append(0 if other == rank else int(rows + results) * row_bytes)
        assert group.take_bytes_sent() == tuple(wanted)
        assert group.take_bytes_sent() == (0,) * NUM_RANKS


@pytest.mark.parametrize(
    "changes", [{"summed": False}, {"element_bytes": 4}, {"width": 40}], ids=str
)
def test_rows_that_cannot_be_int8_are_refused(changes: dict) -> None:
    fields = {
        "num_ranks": 2,
        "max_tokens": 8,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "width": 64,
        "element_bytes": 2,
        "summed": True,
        "as_int8": True,
    }
    assert ArenaLayout(**fields).num_bytes > 0
    with pytest.raises(UsageError, match="use --payload full"):
        ArenaLayout(**fields | changes)


def test_answers_part_where_they_differ() -> None:
    assert equal_beginning([1, 2, 3], [1, 2, 3]) == 3
    assert equal_beginning([1, 2, 3], [1, 5, 3]) == 1
