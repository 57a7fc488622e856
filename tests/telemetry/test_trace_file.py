"""Traces on disk: nothing is lost, Perfetto gets what it wants, and bad files are refused."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.errors import UsageError
from lightmoe.telemetry.records import Record, Trace
from lightmoe.telemetry.trace_file import read_trace, to_json, write_bounded, write_trace
from tests.telemetry.traces import BASE_NS, gpu_trace, record

NUMBERS = st.none() | st.integers(0, 100)
RECORDS = st.builds(
    lambda begin, size, **values: Record(
        start_ns=BASE_NS + begin, end_ns=BASE_NS + begin + size, **values
    ),
    begin=st.integers(0, 10**12),
    size=st.integers(0, 10**10),
    rank=st.integers(0, 9),
    kind=st.sampled_from(["span", "kernel", "copy"]),
    name=st.text(min_size=1, max_size=12),
    track=st.integers(0, 2**31),
    stage=st.sampled_from(["", "dispatch", "experts"]),
    layer=NUMBERS,
    chunk=NUMBERS,
    step=NUMBERS,
    num_bytes=st.integers(0, 2**40),
    bytes_sent=st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
)


@settings(deadline=None)
@given(records=st.lists(RECORDS, max_size=8), title=st.text(max_size=20))
def test_a_file_holds_every_record_to_the_nanosecond(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], title: str
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.json.gz"
    written = Trace(tuple(records), title)
    write_trace(written, path)
    assert read_trace(path) == written


def test_plain_and_packed_files_say_the_same(tmp_path: Path) -> None:
    for name in ("trace.json", "trace.json.gz"):
        write_trace(gpu_trace(), tmp_path / name)
    assert read_trace(tmp_path / "trace.json") == read_trace(tmp_path / "trace.json.gz")
    assert (tmp_path / "trace.json.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_perfetto_shows_a_process_a_rank_and_its_tracks_in_order() -> None:
    trace = Trace(
        (
            *gpu_trace().records,
            record("HtoD", 5, 6, kind="copy", track=7),
        )
    )
    events = json.loads(to_json(trace))["traceEvents"]
    names = [event for event in events if event["ph"] == "M" and event["name"] == "process_name"]
    assert [(one["pid"], one["args"]["name"]) for one in names] == [(0, "rank 0"), (1, "rank 1")]
    tracks = [event for event in events if event["name"] == "thread_name" and event["pid"] == 0]
    assert [(one["tid"], one["args"]["name"]) for one in tracks] == [
        (0, "compute: stream 7"),
        (1, "communication: stream 20"),
        (2, "communication: stream 21"),
        (3, "copies: stream 7"),
        (4, "host: thread 100"),
    ]
    boxes = [event for event in events if event["ph"] == "X"]
    assert len(boxes) == len(trace.records)
    assert min(one["ts"] for one in boxes) == 0
    (copy,) = [one for one in boxes if one["cat"] == "copy"]
    assert (copy["tid"], copy["ts"], copy["dur"]) == (3, 5, 1)


def test_boxes_of_one_track_nest_or_stay_apart() -> None:
    events = json.loads(to_json(gpu_trace(num_chunks=4)))["traceEvents"]
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            box = (event["ts"], event["ts"] + event["dur"])
            tracks.setdefault((event["pid"], event["tid"]), []).append(box)
    for boxes in tracks.values():
        boxes.sort()
        for (_, end), (begin, _) in zip(boxes, boxes[1:], strict=False):
            assert end <= begin


def test_a_bounded_file_keeps_the_first_steps_that_fit(tmp_path: Path) -> None:
    trace, path = gpu_trace(num_steps=6), tmp_path / "trace.json"
    write_trace(trace.only_steps(range(2)), path)
    room = path.stat().st_size
    assert write_bounded(trace, path, room) == 2
    assert read_trace(path) == trace.only_steps(range(2))
    assert write_bounded(trace, path, 1) == 1
    assert {step for _, step in read_trace(path).steps} == {0}
    assert write_bounded(trace, path, 1 << 20) == 6


def test_three_steps_of_a_large_model_on_ten_ranks_stay_below_2_mib(tmp_path: Path) -> None:
    layers = 48
    records = [
        record(
            f"kernel_{place % 40}",
            (step * layers + layer) * 3000 + 60 * place + (37 * place * rank) % 53,
            (step * layers + layer) * 3000 + 60 * place + 40 + (place * layer) % 17,
            rank=rank,
            step=step,
            layer=layer,
            chunk=place % 2,
            stage=("attention", "dispatch", "experts", "combine")[place % 4],
        )
        for rank in range(10)
        for step in range(3)
        for layer in range(layers)
        for place in range(40)
    ]
    started = time.process_time()
    assert write_bounded(Trace(tuple(records)), tmp_path / "trace.json.gz", 2 << 20) == 3
    assert time.process_time() - started < 30


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"{"),
        ("b.json", b"[]"),
        ("c.json", b'{"baseTimeNanoseconds": 0}'),
        ("d.json.gz", b"no gzip"),
        ("e.json.gz", gzip.compress(b"{}")[:-4]),
        ("f.json", b'{"baseTimeNanoseconds": 0, "title": "", "traceEvents": [{"ph": "X"}]}'),
    ],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{name}.* (is no trace of ours|cannot be read)"):
        read_trace(path)


def test_an_unknown_kind_of_record_is_refused(tmp_path: Path) -> None:
    document: dict[str, Any] = json.loads(to_json(gpu_trace()))
    document["traceEvents"][-1]["cat"] = "cpu_op"
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="unknown kind 'cpu_op'"):
        read_trace(path)


def test_paths_that_cannot_be_used_say_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot be written"):
        write_trace(gpu_trace(), tmp_path / "none" / "trace.json")
