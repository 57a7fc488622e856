"""Which part of a trace its picture shows."""

from __future__ import annotations

import pytest

from lightmoe.telemetry.intervals import length
from lightmoe.telemetry.records import Trace
from lightmoe.telemetry.timeline_panel import panel_of
from tests.telemetry.traces import BASE_NS, gpu_trace, in_halves, record


def test_a_panel_shows_two_layers_of_the_middle_step_of_every_rank() -> None:
    panel = panel_of(gpu_trace(num_ranks=3, num_chunks=2, num_steps=3))
    # A layer takes 550 us, so the second step begins at 1650; rank 2 is 20 us late.
    assert (panel.start_ns - BASE_NS, panel.length_ns) == (1650_000, 1120_000)
    assert panel.layers == [(BASE_NS + 1650_000, 0), (BASE_NS + 2200_000, 1)]
    assert [row.rank for row in panel.rows] == [0, 1, 2]
    for row in panel.rows[:1]:
        assert length(row.compute["attention"]) == 220_000
        assert length(row.compute["experts"]) == 600_000
        assert length(row.communication["dispatch"]) == 200_000
        assert length(row.communication["combine"]) == 400_000
        assert length(row.exposed) == 300_000


def test_on_the_cpu_a_stage_is_what_is_left_of_it_without_waiting() -> None:
    spans = (
        record("step", 0, 100, kind="span"),
        record("pipeline", 5, 95, kind="span", layer=0, stage="step"),
        record("dispatch", 10, 50, kind="span", layer=0, stage="pipeline"),
        record("collective", 20, 50, kind="span", layer=0, stage="dispatch"),
        record("experts", 50, 90, kind="span", layer=0, stage="pipeline"),
    )
    panel = panel_of(Trace(spans))
    (row,) = panel.rows
    assert {stage: length(part) for stage, part in row.compute.items()} == {
        "": 10_000,
        "dispatch": 10_000,
        "experts": 40_000,
    }
    assert length(row.communication["dispatch"]) == length(row.exposed) == 30_000
    assert (panel.source, panel.exposed_share) == ("spans", pytest.approx(0.3))


def test_without_layers_the_whole_step_is_shown() -> None:
    kernels = (record("step", 0, 100, kind="span"), record("exchange_pull", 10, 140))
    panel = panel_of(Trace(kernels))
    assert (panel.length_ns, panel.layers) == (140_000, [])


def test_kernels_that_lag_the_host_decide_which_layers_are_seen() -> None:
    # The host has enqueued all six layers when the device begins the first.
    hosts = [
        record("attention", 10 * layer, 10 * layer + 5, kind="span", layer=layer, stage="step")
        for layer in range(6)
    ]
    kernels = [
        one
        for layer in range(6)
        for begin in [1000 + 500 * layer]
        for one in (
            # Launched early: until its turn comes it waits for the kernel before it.
            record("add_norm", begin - 20, begin + 100, layer=layer, stage="attention"),
            record("grouped_gemm", begin + 100, begin + 400, layer=layer, stage="experts"),
            record("exchange_combine", begin + 400, begin + 500, layer=layer, stage="combine"),
        )
    ]
    copies = [
        record("HtoD", 5 * layer, 5 * layer + 5, kind="copy", layer=layer, track=9)
        for layer in range(6)
    ]
    step = record("step", 0, 70, kind="span")
    panel = panel_of(Trace((*hosts, *kernels, *copies, step)))
    assert panel.layers == [(BASE_NS + 2000_000, 2), (BASE_NS + 2500_000, 3)]
    assert panel.length_ns == 1000_000
    (row,) = panel.rows
    assert length(row.compute["experts"]) == 600_000
    assert length(row.exposed) == length(row.communication["combine"]) == 200_000


def test_of_halves_a_period_from_attention_to_attention_is_seen() -> None:
    panel = panel_of(in_halves(num_ranks=2))
    # A layer takes 600 us and rank 1 is 10 us late.
    assert panel.layers == [(BASE_NS + 1200_000, 2), (BASE_NS + 1800_000, 3)]
    assert panel.length_ns == 1210_000
    first, _ = panel.rows
    # Two layers' attention, the beginning of the next, and what runs beside it of the layer before.
    assert length(first.compute["attention"]) == 2 * 200_000 + 10_000
    assert length(first.compute["experts"]) == 2 * 500_000 + 10_000
    assert length(first.communication["combine"]) == 2 * 100_000
    assert length(first.exposed) == 0


def test_where_no_layer_follows_the_rest_of_the_step_is_seen() -> None:
    kernels = [record("flash", 10 + 50 * layer, 40 + 50 * layer, layer=layer) for layer in (0, 1)]
    panel = panel_of(
        Trace((*kernels, record("lm_head", 120, 150), record("step", 0, 20, kind="span")))
    )
    assert panel.layers == [(BASE_NS + 10_000, 0), (BASE_NS + 60_000, 1)]
    assert panel.length_ns == 140_000


def test_on_the_cpu_a_time_counts_for_the_inmost_span() -> None:
    spans = (
        record("step", 0, 100, kind="span"),
        record("experts", 10, 90, kind="span", layer=0, stage="step"),
        record("combine", 60, 80, kind="span", layer=0, stage="experts"),
    )
    (row,) = panel_of(Trace(spans)).rows
    assert {stage: length(part) for stage, part in row.compute.items()} == {
        "combine": 20_000,
        "experts": 60_000,
    }
