"""The exchange's kernels of rows, run on the host: rows and weights in, sums, sums back, counts."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightmoe.kernels.exchange import RowBlock
from tests.kernels.drivers import HERE
from tests.kernels.exchange_cases import (
    CombineArgs,
    CountArgs,
    GiveArgs,
    PullArgs,
    Ranks,
    SumArgs,
)
from tests.kernels.route_cases import compile_host

SEEDS = st.integers(0, 2**32 - 1)
KINDS = pytest.mark.parametrize(
    ("dtype", "as_int8"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)],
    ids=["int8", "bf16", "fp32"],
)


def of_examples(number: int) -> settings:
    return settings(deadline=None, derandomize=True, max_examples=number)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulated") / "exchange.so"
    source = HERE / "emulator/exchange.cpp"
    kernels = ctypes.CDLL(str(compile_host(source, library, f"-I{HERE / 'emulator/cuda'}")))
    for name in ("run_pull", "run_give", "run_sum", "run_combine", "run_count"):
        getattr(kernels, name).restype = ctypes.c_bool
    return kernels


def pairs_of(ranks: Ranks, rank: int) -> Tensor:
    """Results [P, D] of a rank, weighted; some are zeros, one is not finite."""
    generator = torch.Generator().manual_seed(rank)
    pairs = torch.randn(ranks.num_pairs[rank], ranks.block.width, generator=generator)
    pairs[::5] = 0
    pairs[3:4, 7] = float("inf")
    return pairs.to(ranks.dtype)


@KINDS
def test_every_pair_gets_its_row_and_its_weight(
    emulated: ctypes.CDLL, dtype: torch.dtype, as_int8: bool
) -> None:
    @of_examples(10)
    @given(seed=SEEDS)
    def check(seed: int) -> None:
        ranks = Ranks.random(seed, dtype, as_int8)
        arenas, wanted = ranks.published(), ranks.pulled()
        for rank in range(ranks.num_ranks):
            rows = torch.full((ranks.num_pairs[rank], ranks.block.width), 9.0, dtype=dtype)
            pair_weight = torch.full((ranks.num_pairs[rank],), 9.0)
            output_rows = torch.full((ranks.num_pairs[rank],), -1)
            args = PullArgs(
                ranks.addresses(arenas),
                ranks.addresses(arenas),
                ranks.chunk(rank),
                ranks.weights.data_ptr(),
                pair_weight.data_ptr(),
                output_rows.data_ptr(),
                ranks.prefixes.data_ptr(),
                rows.data_ptr(),
                ranks.block.scale_offset,
                ranks.block.row_bytes,
            )

            assert emulated.run_pull(ctypes.byref(args), as_int8)

            source, token, k = torch.where(ranks.target == rank)
            at = ranks.position[source, token, k]
            assert sorted(at.tolist()) == list(range(ranks.num_pairs[rank]))
            assert torch.equal(rows[at], wanted[source, token])
            assert torch.equal(pair_weight[at], ranks.weights[source, token, k])
            begin = torch.tensor([arena.data_ptr() for arena in arenas])[source]
            number = ranks.result_rows()[source, token, k]
            assert torch.equal(output_rows[at] - begin, number * ranks.block.row_bytes)

    check()


@KINDS
def test_tokens_get_the_sum_of_their_sums(
    emulated: ctypes.CDLL, dtype: torch.dtype, as_int8: bool
) -> None:
    @of_examples(10)
    @given(seed=SEEDS)
    def check(seed: int) -> None:
        ranks = Ranks.random(seed, dtype, as_int8)
        is_float32 = dtype == torch.float32
        results = [pairs_of(ranks, rank) for rank in range(ranks.num_ranks)]
        arenas = []  # one of each rank, with a block for each source
        for rank, pairs in enumerate(results):
            arena = ranks.blocks(ranks.num_ranks)
            args = SumArgs(
                pairs.data_ptr(),
                ranks.addresses(arena),
                ranks.chunk(rank),
                ranks.block.scale_offset,
                pairs.shape[1] * dtype.itemsize,
            )
            assert emulated.run_sum(ctypes.byref(args), is_float32, as_int8)
            arenas.append(arena)
        for source, span in enumerate(ranks.spans):
            if span.start == span.stop:
                continue  # the host launches nothing
            output = torch.full((span.stop - span.start, ranks.block.width), 9.0, dtype=dtype)
            here = torch.stack([arena[source] for arena in arenas])
            args = CombineArgs(
                ranks.addresses(here),
                ranks.places(),
                0,
                ranks.choices[source].data_ptr(),
                0,
                output.data_ptr(),
                ranks.block.scale_offset,
                span.start,
                len(output),
                source,
                ranks.weights.shape[2],
                ranks.block.row_bytes,
                0,
                1,
            )

            assert emulated.run_combine(ctypes.byref(args), is_float32, as_int8)

            for token, found in enumerate(output, span.start):
                wanted = ranks.combined(results, source, token)
                torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)

    check()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_results_that_were_given_are_weighted_in_ascending_k(
    emulated: ctypes.CDLL, dtype: torch.dtype, together: bool
) -> None:
    ranks = Ranks.random(5, dtype, as_int8=False)
    results = [pairs_of(ranks, rank) for rank in range(ranks.num_ranks)]
    per_token = ranks.weights.shape[2]
    for source, span in enumerate(ranks.spans):
        if span.start == span.stop:
            continue  # the host launches nothing
        # A rank gives itself its results elsewhere than the others do, unless all lie together.
        rooms = [torch.full((17 * per_token, ranks.block.width), 9.0, dtype=dtype)] * 2
        if not together:
            rooms[1] = rooms[0].clone()
        for rank, pairs in enumerate(results):
            give(emulated, ranks, rank, source, pairs, rooms[rank == source])
        room_of = [rooms[rank == source] for rank in range(ranks.num_ranks)]
        output = torch.full((span.stop - span.start, ranks.block.width), 9.0, dtype=dtype)
        args = CombineArgs(
            type(ranks.addresses(ranks.blocks(1)))(*(room.data_ptr() for room in room_of)),
            ranks.places(),
            ranks.prefixes[source].data_ptr(),
            ranks.choices[source].data_ptr(),
            ranks.weights[source].data_ptr(),
            output.data_ptr(),
            0,
            span.start,
            len(output),
            source,
            per_token,
            ranks.block.row_bytes,
            together,
        )
        assert emulated.run_combine(ctypes.byref(args), dtype == torch.float32, False)

        for token, found in enumerate(output, span.start):
            wanted = torch.zeros(ranks.block.width)
            for k, weight in enumerate(ranks.weights[source, token]):
                target = int(ranks.target[source, token, k])
                if target >= 0:
                    pair = results[target][ranks.position[source, token, k]]
                    wanted += weight * pair.float()
            torch.testing.assert_close(found, wanted.to(dtype), rtol=0, atol=0, equal_nan=True)


def give(
    emulated: ctypes.CDLL, ranks: Ranks, rank: int, source: int, pairs: Tensor, room: Tensor
) -> None:
    """What `rank` has for tokens of `source`, by the kernel that carries results."""
    token, k = torch.where(ranks.target[source] == rank)
    mine = ranks.position[source, token, k]
    number = ranks.result_rows()[source, token, k]
    output_rows = room.data_ptr() + number * ranks.block.row_bytes
    count = torch.tensor([len(mine)], dtype=torch.int32)
    chosen = pairs[mine]
    args = GiveArgs(
        chosen.data_ptr(),
        output_rows.data_ptr(),
        count.data_ptr(),
        len(mine) + 5,
        ranks.block.row_bytes,
    )
    assert emulated.run_give(ctypes.byref(args))


@pytest.mark.parametrize("summed", [False, True])
def test_what_is_sent_is_counted(emulated: ctypes.CDLL, summed: bool) -> None:
    @of_examples(15)
    @given(seed=SEEDS)
    def check(seed: int) -> None:
        ranks = Ranks.random(seed, torch.bfloat16, summed)
        for rank in range(ranks.num_ranks):
            sent = torch.zeros(2, ranks.num_ranks, dtype=torch.int64)
            chunk = ranks.chunk(rank)
            args = CountArgs(chunk, sent[0].data_ptr(), sent[1].data_ptr(), summed)

            assert emulated.run_count(ctypes.byref(args))

            for other in range(ranks.num_ranks):
                rows = (ranks.target[rank] == other).any(dim=1).sum()
                here = ranks.target[other] == rank
                results = here.any(dim=1).sum() if summed else here.sum()
                assert sent[:, other].tolist() == [rows, results]

    check()


def test_a_block_has_codes_then_scales() -> None:
    full, int8 = RowBlock(100, 48, 2), RowBlock(100, 48, 2, as_int8=True)

    assert (full.row_bytes, full.scale_offset, full.bytes_on_link) == (96, 0, 96)
    assert (int8.row_bytes, int8.scale_offset, int8.bytes_on_link) == (48, 4800, 52)
    assert (full.num_bytes, int8.num_bytes) == (9728, 5376)
