"""The benches of the exchange and of scaling on CPU ranks: rows, and bytes that were sent."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_exchange
import bench_scaling
import numpy as np
import protocol
import pytest
import torch
from bench_exchange import Exchange, bytes_between, check
from ep_ranks import RankLayer
from ep_transports import ALL_SHAPES, in_setting, over

from lightmoe.distributed.communicator import Communicator
from lightmoe.moe.dispatch import GlooDispatcher, LocalDispatcher
from tests.ranks import RankThreads
from tests.topology.machines import box, linked

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are for CPU ranks")

NUM_RANKS, NUM_TOKENS = 3, 17
TINY = ALL_SHAPES["tiny"]
ROW = {
    "setting",
    "shape",
    "tokens_per_rank",
    "transport",
    "chunks",
    "mode",
    "naive_ms",
    "ours_ms",
    "compute_ms",
    "comm_ms",
    "limit_ms",
    "hidden_fraction",
}
"""What every row of an exchange's bench has."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankThreads]:
    threads = RankThreads(NUM_RANKS)
    yield threads
    threads.close()


def layer(communicator: Communicator) -> RankLayer:
    return RankLayer(communicator, torch.device("cpu"), TINY, NUM_TOKENS, "host")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[list[dict[str, Any]], list[str]]]:
    """Runs a bench as from the shell: its rows, and the lines that it printed."""

    def run_bench(main: Callable[[], None], *arguments: str) -> tuple[list[Any], list[str]]:
        monkeypatch.setattr(protocol, "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", ["bench.py", *arguments, "--commit", "abc1234"])
        main()
        (written,) = tmp_path.glob("*.json")
        result = json.loads(written.read_text())
        assert result["commit"] == "abc1234"
        return result["rows"], capsys.readouterr().out.splitlines()

    return run_bench


def test_the_exchange_on_two_processes(run: Callable[..., Any]) -> None:
    rows, lines = run(
        bench_exchange.main,
        *("--ranks", "2", "--shapes", "tiny", "--tokens", "1", "32"),
        *("--topology", "cpu-10", "--num-samples", "2"),
    )
    assert [(row["tokens_per_rank"], row["transport"]) for row in rows] == [
        (1, "gloo"),
        (32, "gloo"),
    ]
    for row in rows:
        assert row.keys() >= ROW
        assert (row["setting"], row["topology"]) == ("cpu", "cpu-10")
        assert 0 < row["ours_min_ms"] <= row["ours_ms"] <= row["ours_max_ms"]
        assert min(row["naive_ms"], row["dispatch_ms"], row["combine_ms"], row["route_ms"]) > 0
        assert row["over_naive"] == pytest.approx(row["naive_ms"] / row["ours_ms"])
        moved_ms = row["dispatch_ms"] + row["combine_ms"]
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / moved_ms / 1e6)
    assert rows[1]["bytes"] > rows[0]["bytes"]
    assert len(lines) == 1 + 2 + 1  # head, rows, file


def test_scaling_from_one_process_to_two(run: Callable[..., Any]) -> None:
    rows, lines = run(
        bench_scaling.main,
        *("--ranks", "2", "--shapes", "tiny", "--tokens", "32", "--num-samples", "2"),
    )
    assert [(row["ranks"], row["transport"]) for row in rows] == [(1, "local"), (2, "gloo")]
    one, two = rows
    assert one["efficiency"] == 1
    assert two["efficiency"] == pytest.approx(one["ours_ms"] / two["ours_ms"])
    assert one["hidden_fraction"] == 0
    for row in rows:
        assert row.keys() >= ROW
        assert row["limit_ms"] == max(row["compute_ms"], row["comm_ms"])
        assert row["tokens_per_second_per_card"] == pytest.approx(32e3 / row["ours_ms"])
        assert row["naive_ms"] > 0
    assert len(lines) == 1 + 2 + 1


def test_rows_come_home_and_bytes_are_those_that_were_sent(ranks: RankThreads) -> None:
    def task(communicator: Communicator) -> tuple[np.ndarray, list[int], list[int]]:
        own = layer(communicator)
        hidden = own.hidden(NUM_TOKENS)
        choice = own.gate(hidden, None)
        exchange = Exchange(own, hidden, choice)
        for _ in range(2):
            check(exchange(), hidden, "gloo")
        assert set(exchange.stages_ms(2)) == {"route_ms", "dispatch_ms", "combine_ms"}
        (receipt,) = own.dispatcher.route(choice, 1)
        row_bytes = hidden[0].nbytes
        return (
            bytes_between(own, choice, hidden) / row_bytes,
            list(receipt.rows_sent),
            list(receipt.pairs_returned),
        )

    results = ranks.run(task)
    for rank, (matrix, rows_sent, pairs_returned) in enumerate(results):
        assert np.array_equal(matrix, results[0][0]), "all ranks reckon alike"
        sent = [rows + pairs for rows, pairs in zip(rows_sent, pairs_returned, strict=True)]
        sent[rank] = 0
        assert matrix[rank].tolist() == sent


def test_what_comes_home_wrong_is_refused() -> None:
    hidden = torch.randn(4, 8)
    check(hidden * 1.001, hidden, "it")
    for wrong in (hidden.flip(0), torch.full_like(hidden, torch.nan)):
        with pytest.raises(SystemExit, match="it brings back something else"):
            check(wrong, hidden, "it")


def test_a_layer_goes_over_what_is_asked(ranks: RankThreads) -> None:
    def task(communicator: Communicator) -> None:
        own = layer(communicator)
        assert isinstance(own.dispatcher, GlooDispatcher)
        over(own, "local")
        assert isinstance(own.dispatcher, LocalDispatcher)
        over(own, "gloo")
        assert isinstance(own.dispatcher, GlooDispatcher)
        check(Exchange(own, hidden := own.hidden(4), own.gate(hidden, None))(), hidden, "gloo")

    ranks.run(task)


def test_settings_and_counts() -> None:
    joined = replace(linked(), p2p_groups=((0, 1),))
    assert in_setting(joined, "nvlink") == joined
    assert not in_setting(joined, "no-p2p").has_p2p(0, 1)
    assert in_setting(box(), "cpu") == box()
    assert [bench_scaling.doublings(most) for most in (1, 2, 3, 4, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 8],
    ]


def test_the_table_is_short() -> None:
    common = {"naive_ms": 1234.5, "limit_ms": 0.123456, "graph_ms": None, "over_limit": 12345.6}
    rows = [
        common
        | {
            "setting": setting,
            "shape": shape,
            "tokens_per_rank": tokens,
            "transport": transport,
            "ours_ms": 1234.5,
            "gigabytes_per_second": 1234.5,
        }
        for setting in ("nvlink", "no-p2p")
        for shape in ("mixtral", "qwen3")
        for tokens in (1, 8, 64, 512, 2048, 8192)
        for transport in ("copy_engine", "nccl")
    ]
    lines = bench_exchange.table(rows)
    assert len(lines) == 1 + 24
    assert len({len(line) for line in lines}) == 1
    assert max(map(len, lines)) < 160
