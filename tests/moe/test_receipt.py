"""Receipts of tensors are those of numpy, whatever was chosen, and chunks exchange as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from lightmoe.distributed.communicator import Communicator
from lightmoe.moe.dispatch import ExpertGroup, NcclDispatcher, Receipt
from lightmoe.moe.dispatch.host_receipt import HostReceiptWriter
from lightmoe.moe.dispatch.receipt import ReceiptWriter
from lightmoe.moe.gate import Choice
from tests.moe.test_dispatch import TOKENS_PER_TILE, WIDTH, Case, cases, halves, one_expert
from tests.ranks import RankThreadsCache

CPU = torch.device("cpu")


def group_of(case: Case, rank: int, communicator: Communicator | None = None) -> ExpertGroup:
    return ExpertGroup(
        rank=rank,
        placement=case.placement,
        communicator=communicator,
        route=case.route,
        layer_pairs=np.zeros(1, dtype=np.int64),
        tokens_per_rank=case.tokens_per_rank,
        nearness=case.nearness,
    )


def plain(receipt: Receipt) -> dict[str, object]:
    """Everything but the groups, which may be empty in one and left out in the other."""
    groups = receipt.groups
    sizes = groups.offsets.diff().tolist()
    fields: dict[str, object] = {
        "groups": [pair for pair in zip(groups.slots.tolist(), sizes, strict=True) if pair[1]],
        "num_pairs": groups.num_pairs,
        "tokens": receipt.tokens,
    }
    for name in ("pair_row", "pair_index", "send_row", "return_order"):
        tensor = getattr(receipt, name)
        assert isinstance(tensor, Tensor)
        fields[name] = tensor.tolist()
    for name in ("rows_sent", "rows_received", "pairs_returned", "pairs_received"):
        fields[name] = list(getattr(receipt, name))
    return fields


@settings(deadline=None, derandomize=True, max_examples=150)
@given(case=cases())
@example(one_expert((4, 0, 3)))
@example(one_expert((0, 1, 0), num_chunks=3))
@example(one_expert((0, 0, 0), num_chunks=2))
def test_both_writers_say_the_same(case: Case) -> None:
    everyone = torch.from_numpy(case.experts.copy())
    for rank in range(case.num_ranks):
        ours, theirs = group_of(case, rank), group_of(case, rank)
        # Slots in the order of the experts: so both sort pairs alike.
        write = ReceiptWriter(ours, 0, CPU, lambda *_: TOKENS_PER_TILE)
        found = [plain(receipt) for receipt in write(everyone, case.num_chunks)]
        wanted = [plain(one) for one in HostReceiptWriter(theirs, 0)(everyone, case.num_chunks)]

        assert found == wanted
        assert ours.layer_pairs.tolist() == theirs.layer_pairs.tolist()


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 5])
def test_a_dispatch_and_a_combine_in_one_exchange(ranks: RankThreadsCache, num_chunks: int) -> None:
    """Chunk i+1 goes out while chunk i-1 comes back, with gloo in the place of NCCL."""
    case = one_expert((7, 0, 5), num_chunks)

    def task(communicator: Communicator) -> bool:
        group = group_of(case, communicator.rank, communicator)
        dispatcher = NcclDispatcher(group, 0, CPU, lambda *_: TOKENS_PER_TILE, communicator)
        experts = torch.from_numpy(case.experts[case.of_rank(group.rank)].copy())
        choice = Choice(experts, halves(experts))
        hidden = torch.randn(len(experts), WIDTH)
        receipts = dispatcher.route(choice, num_chunks)
        arrived = [dispatcher.dispatch(hidden, receipts[0])]
        outputs = []
        for before, receipt in zip(receipts, receipts[1:], strict=False):
            pairs = arrived[-1].index_select(0, before.pair_row)
            rows, output = dispatcher.exchange((hidden, receipt), (pairs, choice.weights, before))
            arrived.append(rows)
            outputs.append(output)
        pairs = arrived[-1].index_select(0, receipts[-1].pair_row)
        outputs.append(dispatcher.combine(pairs, choice.weights, receipts[-1]))
        return torch.equal(torch.cat(outputs), hidden)

    assert ranks.run(case.num_ranks, task) == [True] * case.num_ranks
