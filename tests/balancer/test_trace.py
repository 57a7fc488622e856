"""Traces: what is written is read, anyone may write them, and what is no routing is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.balancer.synthetic import SyntheticRouting, synthetic_trace
from lightmoe.balancer.trace import RoutingTrace, TraceWriter, read_trace, write_trace
from lightmoe.errors import TraceError


def arrays(**changed: Any) -> dict[str, Any]:
    """A trace of 3 tokens, 2 layers, top 2 of 4 experts, as plain arrays."""
    experts = np.array([[[0, 1], [2, 3]], [[1, 0], [3, 1]], [[3, 2], [0, 2]]], dtype=np.uint16)
    return {
        "experts": experts,
        "step_ids": np.array([5, 5, 9], dtype=np.int32),
        "source_ranks": np.array([0, 1, 0], dtype=np.int16),
        "num_experts": np.array(4),
    } | changed


def trace(**changed: Any) -> RoutingTrace:
    given = arrays(**changed)
    return RoutingTrace(**(given | {"num_experts": int(given["num_experts"])}))


def same(one: RoutingTrace, other: RoutingTrace) -> bool:
    return one.num_experts == other.num_experts and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in ("experts", "step_ids", "source_ranks")
    )


def test_a_file_written_with_numpy_alone_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "by_hand.npz", **arrays(), comment=np.array("more arrays are allowed"))

    assert same(read_trace(tmp_path / "by_hand.npz"), trace())


def test_numpy_alone_reads_what_is_written(tmp_path: Path) -> None:
    write_trace(trace(), tmp_path / "trace.npz")

    with np.load(tmp_path / "trace.npz", allow_pickle=False) as file:
        read = dict(file)
    assert set(read) == set(arrays())
    for name, array in arrays().items():
        assert read[name].tolist() == array.tolist()
    assert [read[name].dtype for name in ("experts", "step_ids", "source_ranks")] == [
        np.uint16,
        np.int32,
        np.int16,
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.npz"]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8), seed=st.integers(0, 999))
def test_steps_come_back_as_they_were_added(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("traces") / "trace.npz"
    parts = [generator.permuted(np.tile(np.arange(6), (size, 3, 1)), axis=2) for size in sizes]
    with TraceWriter(path, 3, 6, 2) as writer:
        for step, experts in enumerate(parts):
            writer.add(step, experts[:, :, :2], np.full(len(experts), step % 4))
    if not sum(sizes):
        with pytest.raises(TraceError, match="record at least one token"):
            read_trace(path)
        return

    read = read_trace(path)

    assert (read.experts == np.concatenate(parts)[:, :, :2]).all()
    assert read.step_ids.tolist() == np.repeat(np.arange(len(sizes)), sizes).tolist()
    assert (read.source_ranks == read.step_ids % 4).all()
    counts = read.counts(0, read.num_steps)
    filled = [part for part in parts if len(part)]
    assert len(counts) == len(filled)
    for of_step, experts in zip(counts, filled, strict=True):
        for layer in range(3):
            expected = np.bincount(experts[:, layer, :2].ravel(), minlength=6)
            assert of_step[layer].tolist() == expected.tolist()


def test_steps_in_any_order_and_with_gaps_are_counted() -> None:
    mixed = trace(step_ids=np.array([9, 5, 9], dtype=np.int32))

    assert mixed.num_steps == 2
    assert mixed.counts(0, 2)[:, 0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert mixed.counts(1, 2).tolist() == mixed.counts(0, 2)[1:].tolist()


def test_a_run_that_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    write_trace(trace(), path)

    def run() -> None:
        with TraceWriter(path, 2, 4, 2) as writer:
            writer.add(0, arrays()["experts"], arrays()["source_ranks"])
            raise RuntimeError("died")

    with pytest.raises(RuntimeError, match="died"):
        run()

    assert same(read_trace(path), trace())
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.npz"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="missing/trace.npz cannot be written: No such file"):
        TraceWriter(tmp_path / "missing" / "trace.npz", 2, 4, 2)
    with pytest.raises(TraceError, match="none.npz cannot be read: No such file"):
        read_trace(tmp_path / "none.npz")


BAD = [
    ({"experts": arrays()["experts"].astype(np.int64)}, "experts is int64 with 3 axes; give uint"),
    ({"experts": arrays()["experts"][:, 0]}, "experts is uint16 with 2 axes"),
    ({"experts": arrays()["experts"][:2]}, "step_ids has 3 tokens, experts 2"),
    ({"step_ids": np.zeros(3)}, "step_ids is float64 with 1 axes; give int32"),
    ({"step_ids": np.array([0, -1, 2], np.int32)}, "step_ids has -1"),
    ({"source_ranks": np.array([0, -1, 2], np.int16)}, "source_ranks has -1"),
    ({"source_ranks": np.zeros(3, np.int32)}, "source_ranks is int32"),
    ({"num_experts": np.array(3)}, "expert 3 is chosen of 3"),
    ({"num_experts": np.array(0)}, "num_experts is 0; give 1 to 65536"),
    ({"num_experts": np.array(1 << 17)}, "num_experts is 131072"),
    ({"experts": np.ones((3, 2, 2), np.uint16)}, "a token chose one expert twice"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_what_is_no_routing_is_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays(**changed))

    with pytest.raises(TraceError, match=f"bad.npz: {message}"):
        read_trace(tmp_path / "bad.npz")


@pytest.mark.parametrize("number", [np.array(4.0), np.array([4, 4]), np.array("four")])
def test_num_experts_is_one_integer(tmp_path: Path, number: np.ndarray) -> None:
    np.savez(tmp_path / "bad.npz", **arrays(num_experts=number))

    with pytest.raises(TraceError, match="bad.npz: num_experts is .*; give one integer"):
        read_trace(tmp_path / "bad.npz")


@pytest.mark.parametrize("missing", list(arrays()))
def test_a_missing_array_is_named(tmp_path: Path, missing: str) -> None:
    kept = {name: array for name, array in arrays().items() if name != missing}
    np.savez(tmp_path / "bad.npz", **kept)

    with pytest.raises(TraceError, match=f"bad.npz is no routing trace .*{missing}"):
        read_trace(tmp_path / "bad.npz")


def test_other_files_and_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    path.write_text("no archive")
    with pytest.raises(TraceError, match=r"is no routing trace \(not a zip archive\)"):
        read_trace(path)
    np.savez(path, **arrays(experts=np.array([object()] * 3)))
    with pytest.raises(TraceError, match="is no routing trace .*allow_pickle=False"):
        read_trace(path)


def test_a_truncated_or_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, **arrays())
    whole = path.read_bytes()
    for cut in range(0, len(whole), 37):
        path.write_bytes(whole[:cut])
        with pytest.raises(TraceError, match="bad.npz"):
            read_trace(path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("num_experts.npy", b"\x93NUMPY\x01\x00\x02\x00{}")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(TraceError, match="is no routing trace"):
        read_trace(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"experts": arrays()["experts"][:, :1]}, r"shape \(3, 1, 2\); give \[tokens, 2, 2\]"),
        ({"experts": arrays()["experts"].astype(int) - 1}, "experts -1 to 2 are chosen of 4"),
        ({"experts": arrays()["experts"].astype(int) + 65536}, "are chosen of 4; number them"),
        ({"step_ids": 1 << 31}, "step_ids has 2147483648, too large for int32"),
        ({"source_ranks": np.full(3, 40000)}, "source_ranks has 40000, too large for int16"),
        ({"source_ranks": np.zeros(2, int)}, "source_ranks has 2 tokens, experts 3"),
    ],
)
def test_a_step_that_is_no_routing_is_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    step = {name: array for name, array in arrays(**changed).items() if name != "num_experts"}
    writer = TraceWriter(tmp_path / "trace.npz", 2, 4, 2)

    with pytest.raises(TraceError, match=message):
        writer.add(**step)
    writer.discard()


ROUTING = SyntheticRouting(
    num_steps=8, tokens_per_step=500, num_layers=2, num_experts=16, num_per_token=3, num_ranks=4
)


def test_made_up_traces_are_the_same_for_the_same_seed() -> None:
    one, other = synthetic_trace(ROUTING), synthetic_trace(ROUTING)

    assert same(one, other)
    assert one.experts.shape == (4000, 2, 3)
    assert one.num_steps == 8
    assert np.bincount(one.source_ranks).tolist() == [1000] * 4


def test_made_up_traces_are_skewed_each_layer_in_its_own_order() -> None:
    single = SyntheticRouting(
        num_steps=1, tokens_per_step=40000, num_layers=2, num_experts=16, num_per_token=1, skew=1.0
    )
    counts = synthetic_trace(single).counts(0, 1)[0]

    share = np.sort(counts / 40000, axis=1)[:, ::-1]
    expected = (1 / np.arange(1, 17)) / (1 / np.arange(1, 17)).sum()
    assert np.abs(share - expected).max() < 0.01
    assert (np.argsort(counts[0]) != np.argsort(counts[1])).any()


def test_made_up_traces_drift_and_shift_when_told() -> None:
    fields = {"num_steps": 8, "tokens_per_step": 20000, "num_layers": 1, "num_experts": 16}
    common: dict[str, Any] = {**fields, "num_per_token": 1}

    def change(step: int, **more: Any) -> float:
        counts = synthetic_trace(SyntheticRouting(**common, **more)).counts(0, 8) / 20000
        return float(np.abs(counts[step] - counts[step - 1]).sum())

    assert change(3) < 0.1
    assert change(2, drift=0.5, num_steady_steps=4) < 0.1
    assert change(4, drift=0.5, num_steady_steps=4) > 0.2
    assert change(5, drift=0.5, num_steady_steps=4, steps_per_drift=2) < 0.1
    assert change(3, domain_shift=True) < 0.1
    assert change(4, domain_shift=True) > 0.3
