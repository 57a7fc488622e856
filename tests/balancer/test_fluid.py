"""The discrete-event machine, on cases that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightmoe.balancer.fluid import Span, Task, run
from lightmoe.topology.cpu import CpuFigures, describe_cpu
from tests.topology.machines import GB, box, linked

LATENCY = 1e-5  # of the linked machine


def ends(spans: list[list[Span]]) -> list[dict[object, float]]:
    return [{span.name: span.end for span in of_rank} for of_rank in spans]


def computing(seconds: float, name: str = "work") -> Task:
    return Task(name=name, stream="compute", seconds=seconds)


def exchanging(name: str = "rows", needs: tuple[str, ...] = ()) -> Task:
    return Task(name=name, stream="exchange", needs=needs, is_exchange=True)


def matrix(num_ranks: int, **bytes_of: float) -> np.ndarray:
    """matrix(3, b01=5) sends 5 bytes from rank 0 to rank 1."""
    result = np.zeros((num_ranks, num_ranks))
    for key, num_bytes in bytes_of.items():
        result[int(key[1]), int(key[2])] = num_bytes
    return result


def test_streams_of_a_rank_run_side_by_side_and_in_order() -> None:
    tasks = [computing(1.0, "a"), computing(2.0, "b"), exchanging()]
    (of_rank, _) = ends(run(linked(2), [tasks, [exchanging()]], {"rows": matrix(2, b01=100 * GB)}))
    assert of_rank == pytest.approx({"a": 1.0, "b": 3.0, "rows": 1.0 + LATENCY})


def test_a_task_waits_for_what_it_needs() -> None:
    first = [computing(1.0), exchanging(needs=("work",))]
    second = [exchanging(), Task(name="next", stream="compute", needs=("rows",), seconds=0.5)]
    done = ends(run(linked(2), [first, second], {"rows": matrix(2, b01=100 * GB)}))
    assert done[1] == pytest.approx({"rows": 2.0 + LATENCY, "next": 2.5 + LATENCY})


def test_a_flow_starts_when_both_ends_are_there() -> None:
    tasks = [
        [exchanging()],
        [computing(3.0), exchanging(needs=("work",))],
        [exchanging()],
    ]
    done = ends(run(linked(3), tasks, {"rows": matrix(3, b01=100 * GB, b02=100 * GB)}))
    assert done[2]["rows"] == pytest.approx(1.0 + LATENCY)
    assert done[1]["rows"] == done[0]["rows"] == pytest.approx(4.0 + LATENCY)


def test_flows_share_a_link_and_speed_up_when_others_end() -> None:
    tasks = [[exchanging()] for _ in range(3)]
    done = ends(run(linked(3), tasks, {"rows": matrix(3, b01=50 * GB, b02=150 * GB)}))
    assert done[1]["rows"] == pytest.approx(1.0 + LATENCY)
    assert done[2]["rows"] == pytest.approx(2.0 + LATENCY)


def test_a_shared_uplink_takes_as_long_as_the_topology_says() -> None:
    everybody = np.full((4, 4), GB)
    np.fill_diagonal(everybody, 0)
    tasks = [[exchanging()] for _ in range(4)]
    done = ends(run(box(), tasks, {"rows": everybody}))
    expected = box().all_to_all_seconds(everybody.tolist())
    assert max(of_rank["rows"] for of_rank in done) == pytest.approx(expected, rel=0.05)


def test_cpu_ranks_share_the_cores() -> None:
    figures = CpuFigures(
        num_cores=2,
        memory_bytes=1 << 30,
        flops_per_second=1e9,
        copy_bytes_per_second=1e9,
        message_seconds=1e-3,
        loopback_bytes_per_second=1e9,
    )
    machine = describe_cpu(figures, "laptop", 4)
    done = ends(run(machine, [[computing(1.0)] for _ in range(4)], {}))
    assert [of_rank["work"] for of_rank in done] == pytest.approx([2.0] * 4)
    messages = np.zeros((4, 4))
    messages[0, 1:] = 1.0
    done = ends(run(machine, [[exchanging()] for _ in range(4)], {"rows": messages}))
    assert done[0]["rows"] == pytest.approx(3e-3, rel=1e-3)


def test_three_short_stages_on_two_cores_take_turns() -> None:
    figures = CpuFigures(
        num_cores=2,
        memory_bytes=1 << 30,
        flops_per_second=1e9,
        copy_bytes_per_second=1e9,
        message_seconds=0.0,
        loopback_bytes_per_second=1e9,
    )
    tasks = [[computing(1.0), exchanging(needs=("work",))] for _ in range(3)]
    exchange = matrix(3, b01=1.0)
    done = ends(run(describe_cpu(figures, "laptop", 3), tasks, {"rows": exchange}))
    assert done[2]["work"] == pytest.approx(2.0)


def test_computing_slows_down_beside_an_exchange() -> None:
    tasks = [[computing(1.0), exchanging()], [exchanging()]]
    done = ends(run(linked(2), tasks, {"rows": matrix(2, b01=1000 * GB)}, slowdown=0.5))
    assert done[0]["work"] == pytest.approx(2.0, rel=1e-4)


def test_the_start_of_an_exchange_and_its_factor() -> None:
    tasks = [[exchanging()], [exchanging()]]
    rows = {"rows": matrix(2, b01=100 * GB)}
    done = ends(run(linked(2), tasks, rows, exchange_seconds=0.25, exchange_factor=2.0))
    assert done[0]["rows"] == pytest.approx(2.25 + LATENCY)


def test_an_exchange_without_bytes_ends_at_once() -> None:
    done = ends(run(linked(2), [[exchanging()], [computing(1.0)]], {"rows": np.zeros((2, 2))}))
    assert done == [{"rows": 0.0}, {"work": 1.0}]


def test_tasks_that_wait_for_each_other_are_found() -> None:
    one = Task(name="a", stream="compute", needs=("b",))
    other = Task(name="b", stream="exchange", needs=("a",))
    with pytest.raises(AssertionError, match="wait for each other"):
        run(linked(1), [[one, other]], {})


@given(st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_no_exchange_beats_its_busiest_link(num_ranks: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.uniform(0, 10 * GB, (num_ranks, num_ranks))
    rows[generator.random(rows.shape) < 0.4] = 0
    np.fill_diagonal(rows, 0)
    machine = linked(num_ranks)
    done = ends(run(machine, [[exchanging()] for _ in range(num_ranks)], {"rows": rows}))
    last = max(of_rank["rows"] for of_rank in done)
    assert last >= machine.all_to_all_seconds(rows.tolist()) * (1 - 1e-9) - LATENCY
