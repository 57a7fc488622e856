"""Copies from other ranks' cards: the bytes that lie there, from pools of any size."""

from __future__ import annotations

import pytest
import torch
from moe.gpu_ranks import run_on_ranks

from lightmoe.distributed.communicator import Communicator
from lightmoe.distributed.peer_copies import PeerCopies
from lightmoe.distributed.peers import gather_bytes

pytestmark = pytest.mark.gpu

NUM_RANKS = 3
BORDERS = (0, 5, 4096, 4097, 300_000)


def pool_of(rank: int) -> torch.Tensor:
    """The bytes that this rank has; small pools lie within an allocation that torch shares out."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(256, (300_000 << 4 * rank,), generator=generator, dtype=torch.uint8)


def _copy(communicator: Communicator, device: torch.device) -> None:
    _ = torch.ones(100, device=device)  # the pool is not the first of its allocation
    mine = pool_of(communicator.rank).to(device)
    copies = PeerCopies(communicator, mine)
    for other in range(NUM_RANKS):
        found = torch.zeros(300_000, dtype=torch.uint8, device=device)
        started = [
            copies.start([(other, begin, found[begin:end])])
            for begin, end in zip(BORDERS, BORDERS[1:], strict=False)
        ]
        for one in started:
            one.result()
            assert one.done()
        assert torch.equal(found.cpu(), pool_of(other)[:300_000])
    target = torch.zeros(1000, dtype=torch.uint8, device=device)
    torch.cuda._sleep(50_000_000)
    target.fill_(7)
    copies.start([((communicator.rank + 1) % NUM_RANKS, 0, target)]).result()
    expected = pool_of((communicator.rank + 1) % NUM_RANKS)[:1000]
    assert torch.equal(target.cpu(), expected), "it did not wait for what was before it"
    gather_bytes(communicator, b"x")  # no rank goes while another reads


def test_ranks_copy_from_each_other() -> None:
    run_on_ranks(NUM_RANKS, _copy)
