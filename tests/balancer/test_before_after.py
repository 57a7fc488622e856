"""`lightmoe heatmap TRACE`: loads before and after are those of a replay, and they are drawn."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from lightmoe.balancer.before_after import before_and_after
from lightmoe.balancer.planner import plan
from lightmoe.balancer.replay import replay
from lightmoe.balancer.replay_command import ReplayOptions
from lightmoe.balancer.synthetic import SyntheticRouting, synthetic_trace
from lightmoe.balancer.trace import write_trace
from lightmoe.cli import main

ROUTING = SyntheticRouting(
    num_steps=20, tokens_per_step=300, num_layers=2, num_experts=8, num_per_token=2, num_ranks=5
)
TRACE = synthetic_trace(ROUTING)


@pytest.mark.parametrize(
    "options",
    [
        ReplayOptions(gpus=5, spares=1, slots_per_spare=4, replan_every=4),
        ReplayOptions(gpus=5, placement="spread", replica_slots=4, replan_every=4),
    ],
    ids=["spare", "spread"],
)
def test_the_loads_are_those_of_a_replay(options: ReplayOptions) -> None:
    (before, after), (low, high) = before_and_after(TRACE, options, "a trace")

    ranks = options.ranks(2, 8)
    alike = plan(np.ones((2, 8)), ranks.slots_per_rank, num_spares=ranks.num_spares)
    alone = replay(TRACE, ranks, ["none"], placement=alike).max_over_mean("none").mean()
    balanced = replay(TRACE, ranks, ["waterfill"], 4).max_over_mean("waterfill").mean()
    assert (low, high) == (pytest.approx(alone), pytest.approx(balanced))
    assert high < low
    tokens = np.zeros((2, 8), dtype=np.int64)
    for layer in range(2):
        np.add.at(tokens[layer], TRACE.experts[:, layer].ravel().astype(int), 1)
    for table in (before, after):
        assert np.array_equal(table.expert_tokens, tokens)
        assert table.rank_pairs.sum(axis=0).tolist() == [20 * 300 * 2] * 2
        assert table.num_steps == 20
    homes = alike.homes
    at_home = [
        [tokens[layer, homes[layer] == rank].sum() for layer in range(2)] for rank in range(5)
    ]
    assert before.rank_pairs.tolist() == at_home


def test_the_picture_says_both_levels_and_marks_the_spares() -> None:
    from lightmoe.telemetry.before_after_figure import draw_before_and_after

    options = ReplayOptions(gpus=5, spares=1, slots_per_spare=4)
    tables, levels = before_and_after(TRACE, options, "a trace")
    figure = draw_before_and_after(tables, levels)

    words = " ".join(text.get_text() for text in figure.texts)
    assert "a trace: expert load, before and after" in words
    assert f"{levels[0]:.2f} before, {levels[1]:.2f} after" in words
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert np.allclose(images[0], tables[0].expert_ratios)
    for image, table in zip(images[1:3], tables, strict=True):
        assert np.allclose(image, table.rank_ratios)
    bars = [axes.patches for axes in figure.axes if len(axes.patches) == 5]
    for of_table, table in zip(bars, tables, strict=True):
        pairs = table.rank_pairs.sum(axis=1)
        assert np.allclose([bar.get_height() for bar in of_table], pairs / pairs.mean())


def lightmoe(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    write_trace(TRACE, tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


def test_the_command_writes_a_picture(trace_path: Path) -> None:
    picture = trace_path.with_suffix(".png")
    assert lightmoe("heatmap", str(trace_path), "--gpus", "5", "-o", str(picture)) == 0
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">I", content[16:20])[0] > 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "http://127.0.0.1:9"], "give one of the two"),
        (["-o", "load.json"], "give a .png"),
        (["--placement", "spread", "--spares", "1"], "--spares is for --placement spare"),
        (["--gpus", "0"], "--gpus 0: give at least 1"),
    ],
)
def test_what_does_not_fit_a_trace_is_said(
    trace_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lightmoe("heatmap", str(trace_path), *arguments) == 2
    assert said in capsys.readouterr().err


def test_flags_of_a_trace_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert lightmoe("heatmap", "--replan-every", "4") == 2
    assert "--replan-every is for a recorded trace" in capsys.readouterr().err
