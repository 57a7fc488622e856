"""The choice of the chunk count: fits, makespans against a plain event list, and where it is 1."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightmoe.errors import UsageError
from lightmoe.kernels import route
from lightmoe.moe.overlap_model import (
    FEWEST_TOKENS,
    MARGIN,
    MAX_CHUNKS,
    LayerCosts,
    Overlap,
    StageCost,
    choose_chunks,
    chunk_of,
    fit,
    pipeline_seconds,
    share_of_up,
)

costs = st.builds(
    LayerCosts,
    *[st.builds(StageCost, st.floats(0, 1e-3), st.floats(0, 1e-6)) for _ in range(8)],
    st.booleans(),
    st.booleans(),
    st.floats(0.3, 0.9),
)
EVEN = LayerCosts(*(StageCost(1e-6, beta) for beta in (1e-7, 2e-7, 1e-7, 1e-7)))


def makespan_of_tasks(layer: LayerCosts, num_tokens: int, num_chunks: int) -> float:
    """The same pipeline as a list of tasks with what each waits for."""
    spans = [chunk_of(num_tokens, chunk, num_chunks) for chunk in range(num_chunks)]
    chunks, last = range(num_chunks), num_chunks - 1
    stream = [f"{kind}{i}" for kind in ("r", "c") for i in chunks]
    products = {kind: [f"{kind}{i}" for i in chunks] for kind in ("u", "d")}
    beside = num_chunks > 1 and not layer.in_turn
    if not beside:
        products = {"ud": [f"{kind}{i}" for i in chunks for kind in ("u", "d")]}
    uploads = [f"h{i}" for i in chunks]
    queues = {"stream": stream, **products, "upload": uploads}
    kinds = {"r": layer.dispatch, "u": layer.up, "d": layer.down, "c": layer.combine}
    kinds["h"] = layer.upload
    needs = {"h": "", "r": "h", "u": "r", "d": "u", "c": "d"}
    done: dict[str, float] = {}
    free = dict.fromkeys(queues, layer.gate.seconds(num_tokens)) | {"upload": 0.0}
    while any(queues.values()):
        for queue, tasks in queues.items():
            if not tasks:
                continue
            kind, index = tasks[0][0], int(tasks[0][1:])
            need = [f"{needs[kind]}{index}"] if needs[kind] else []
            if kind == "c" and layer.put_off and index < last:
                need = [f"d{last - 1}"]
            if all(one in done for one in need):
                seconds = kinds[kind].seconds(spans[index].stop - spans[index].start)
                if kind == "u" and beside:
                    now = share_of_up(layer.up_share, index - 1, num_chunks) if index else 1
                    seconds *= layer.up_share / now
                start = max([free[queue], *(done[one] for one in need)])
                done[tasks.pop(0)] = free[queue] = start + seconds
    enqueuing = layer.host.seconds(num_chunks) - layer.between.seconds(num_tokens)
    return max(*done.values(), enqueuing)


@given(costs, st.integers(1, 4096), st.integers(1, 8))
def test_the_pipeline_takes_as_long_as_its_tasks(
    layer: LayerCosts, num_tokens: int, num_chunks: int
) -> None:
    expected = makespan_of_tasks(layer, num_tokens, num_chunks)
    assert pipeline_seconds(layer, num_tokens, num_chunks) == pytest.approx(expected)


@given(costs, st.integers(0, 4096), st.integers(1, 8))
def test_no_other_count_is_better_and_overlap_pays_its_margin(
    layer: LayerCosts, num_tokens: int, max_chunks: int
) -> None:
    choice = choose_chunks(layer, num_tokens, max_chunks)
    counts = range(1, max(1, min(max_chunks, num_tokens)) + 1)
    times = {count: pipeline_seconds(layer, num_tokens, count) for count in counts}
    assert choice.num_chunks in counts
    assert choice.serial_seconds == times[1]
    assert choice.predicted_seconds == times[choice.num_chunks]
    worth = min(times.values()) <= times[1] * (1 - MARGIN) < times[1]
    assert choice.num_chunks == (min(times, key=lambda n: (times[n], n)) if worth else 1)
    assert choice.reason.startswith(f"{choice.num_chunks} chunk")


def test_long_prompts_are_cut_and_decode_is_not() -> None:
    assert choose_chunks(EVEN, 8192).num_chunks == 8
    decode = choose_chunks(EVEN, 2)
    assert decode.num_chunks == 1
    assert "does not save 5%" in decode.reason


def test_reading_the_weights_again_forbids_chunks() -> None:
    read = StageCost(1e-3, 1e-9)
    memory_bound = LayerCosts(StageCost(1e-5, 1e-7), read, read, StageCost(1e-5, 1e-7))
    assert choose_chunks(memory_bound, 1024).num_chunks == 1


def test_no_tokens_are_one_chunk() -> None:
    assert choose_chunks(EVEN, 0) == choose_chunks(EVEN, 0, max_chunks=1)
    assert choose_chunks(EVEN, 0).num_chunks == 1


def test_the_gate_is_paid_once() -> None:
    gated = dataclasses.replace(EVEN, gate=StageCost(1e-3, 0))
    for count in (1, 4):
        extra = pipeline_seconds(gated, 8192, count) - pipeline_seconds(EVEN, 8192, count)
        assert extra == pytest.approx(1e-3)


def test_only_the_first_chunks_upload_is_waited_for() -> None:
    """One that is much quicker than the exchange, in the gate's time or not."""
    slow = dataclasses.replace(EVEN, upload=StageCost(0, 0.4e-7))
    gated = dataclasses.replace(slow, gate=StageCost(1e-3, 0))
    for count in (1, 2, 4):
        first = chunk_of(8192, 0, count)
        alone = pipeline_seconds(EVEN, 8192, count)
        assert pipeline_seconds(slow, 8192, count) == pytest.approx(alone + 0.4e-7 * first.stop)
        assert pipeline_seconds(gated, 8192, count) == pytest.approx(alone + 1e-3)


@given(
    st.floats(0, 1e-2),
    st.floats(1e-9, 1e-4),
    st.lists(st.integers(1, 10_000), min_size=2, max_size=8, unique=True),
)
def test_a_line_is_found_again(alpha: float, beta: float, counts: list[int]) -> None:
    cost = fit([(n, alpha + n * beta) for n in counts])
    for n in counts:
        assert cost.seconds(n) == pytest.approx(alpha + n * beta, rel=1e-6)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 1.0)), min_size=2, max_size=9))
def test_a_fit_is_never_negative(points: list[tuple[int, float]]) -> None:
    if len({n for n, _ in points}) < 2:
        with pytest.raises(UsageError, match="two token counts"):
            fit(points)
        return
    cost = fit(points)
    assert cost.alpha_seconds >= 0
    assert cost.seconds_per_token >= 0


def test_falling_and_steep_timings_end_at_the_bounds() -> None:
    assert fit([(1, 2e-3), (100, 1e-3)]).seconds_per_token == 0
    assert fit([(100, 1e-4), (200, 1e-3)]).alpha_seconds == 0


def test_small_steps_are_not_cut_whatever_the_costs_say() -> None:
    """They may be padded, on some ranks by a graph that was recorded whole."""
    free = StageCost(0.0, 1e-6)
    overlap = Overlap(num_chunks=None, costs=LayerCosts(free, free, free, free))
    assert overlap.chunks(FEWEST_TOKENS - 1) == 1
    assert overlap.chunks(FEWEST_TOKENS) > 1


def test_a_launch_of_the_route_takes_as_many_chunks() -> None:
    assert MAX_CHUNKS <= route.MAX_CHUNKS
