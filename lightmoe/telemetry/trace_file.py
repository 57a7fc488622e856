"""Traces on disk: Chrome's JSON, one process a rank, as Perfetto (ui.perfetto.dev) opens it.

Written without loss, so that `lightmoe overlap` computes the same from the file. Names end in
.json or .json.gz.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightmoe.errors import UsageError
from lightmoe.telemetry.records import Record, Trace

MAX_READ_BYTES = 1 << 30
_GROUPS = ("compute", "communication", "copies", "host")
"""The tracks of a rank, from the top."""
_KINDS = ("span", "kernel", "copy")
_BAD_FILE = (ValueError, TypeError, KeyError, AttributeError, EOFError, zlib.error)


def write_trace(trace: Trace, path: Path) -> None:
    """Write every record; UsageError where the path cannot be written."""
    content = to_json(trace).encode()
    try:
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None


def write_bounded(trace: Trace, path: Path, max_bytes: int) -> int:
    """Write as many steps, from the first on, as fit into `max_bytes`; how many they are.

    The first step is written whatever its size.
    """
    steps = sorted({step for _, step in trace.steps})
    for num_steps in range(len(steps), 0, -1):
        write_trace(trace.only_steps(steps[:num_steps]), path)
        if path.stat().st_size <= max_bytes:
            return num_steps
    return min(1, len(steps))


def to_json(trace: Trace) -> str:
    """The file's text. Times in it count from `baseTimeNanoseconds`, in microseconds."""
    base = min((record.start_ns for record in trace.records), default=0)
    tracks = _tracks(trace.records)
    events = [*_names(tracks), *(_event(one, base, tracks) for one in trace.records)]
    document = {
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": base,
        "title": trace.title,
        "traceEvents": events,
    }
    return json.dumps(document, separators=(",", ":"))


def read_trace(path: Path) -> Trace:
    """The inverse of write_trace; UsageError for a file that it did not write."""
    try:
        document = json.loads(_read(path))
        base = int(document["baseTimeNanoseconds"])
        records = tuple(
            _record(event, base) for event in document["traceEvents"] if event["ph"] == "X"
        )
        return Trace(records, str(document["title"]))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except _BAD_FILE as error:
        raise UsageError(
            f"{path} is no trace of ours ({error}); give one that `lightmoe profile` wrote, or an"
            " export of nsys that ends in .sqlite"
        ) from None


def _read(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    with gzip.open(path) as file:
        content = file.read(MAX_READ_BYTES + 1)
    if len(content) > MAX_READ_BYTES:
        raise ValueError(f"unpacked it is over {MAX_READ_BYTES} bytes")
    return content


Track = tuple[int, str, int]
"""Rank, group, and number of the thread or stream."""


def _track(record: Record) -> Track:
    if record.kind == "span":
        group = "host"
    elif record.kind == "copy":
        group = "copies"
    else:
        group = record.role
    return record.rank, group, record.track


def _tracks(records: Iterable[Record]) -> dict[Track, int]:
    """The number of each track within its rank, in the order in which they are shown."""
    found = sorted(set(map(_track, records)), key=lambda one: (one[0], _GROUPS.index(one[1]), one))
    return {one: place for place, one in enumerate(found)}


def _names(tracks: dict[Track, int]) -> Iterator[dict[str, Any]]:
    for rank in sorted({rank for rank, _, _ in tracks}):
        yield _metadata("process_name", rank, 0, {"name": f"rank {rank}"})
        yield _metadata("process_sort_index", rank, 0, {"sort_index": rank})
    for (rank, group, number), place in tracks.items():
        what = "thread" if group == "host" else "stream"
        yield _metadata("thread_name", rank, place, {"name": f"{group}: {what} {number}"})
        yield _metadata("thread_sort_index", rank, place, {"sort_index": place})


def _metadata(name: str, rank: int, track: int, values: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": rank, "tid": track, "args": values}


def _event(record: Record, base: int, tracks: dict[Track, int]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "stage": record.stage or None,
        "layer": record.layer,
        "chunk": record.chunk,
        "step": record.step,
        "bytes": record.num_bytes or None,
        "bytes_sent": record.bytes_sent or None,
        "track": record.track,
    }
    return {
        "ph": "X",
        "cat": record.kind,
        "name": record.name,
        "pid": record.rank,
        "tid": tracks[_track(record)],
        "ts": (record.start_ns - base) / 1000,
        "dur": (record.end_ns - record.start_ns) / 1000,
        "args": {name: value for name, value in values.items() if value is not None},
    }


def _record(event: dict[str, Any], base: int) -> Record:
    values, kind = event["args"], event["cat"]
    if kind not in _KINDS:
        raise ValueError(f"unknown kind {str(kind)[:40]!r}")
    start = base + round(event["ts"] * 1000)
    return Record(
        rank=int(event["pid"]),
        kind=kind,
        name=str(event["name"]),
        start_ns=start,
        end_ns=start + round(event["dur"] * 1000),
        track=int(values["track"]),
        stage=str(values.get("stage", "")),
        layer=_number(values.get("layer")),
        chunk=_number(values.get("chunk")),
        step=_number(values.get("step")),
        num_bytes=int(values.get("bytes", 0)),
        bytes_sent=tuple(int(count) for count in values.get("bytes_sent", ())),
    )


def _number(value: Any) -> int | None:
    return None if value is None else int(value)
