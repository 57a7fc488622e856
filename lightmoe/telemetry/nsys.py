"""Records from an nsys report that was exported to SQLite: `nsys export --type sqlite`.

Steps are NVTX ranges named "step", of which the first word counts. Ranges of Light-MoE say more
("step number 7 rank 2", "experts layer 3 chunk 1"), those of other programs need not.
"""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightmoe.errors import UsageError
from lightmoe.telemetry.records import (
    Record,
    SpanIndex,
    SpanIndexes,
    Trace,
    launched_in,
    short_name,
)

_COPY_KINDS = {1: "HtoD", 2: "DtoH", 8: "DtoD", 9: "HtoH", 10: "PtoP"}
"""CUpti_ActivityMemcpyKind, as the column copyKind has it."""
_PROCESS = ~0xFFFFFF
"""Clears a globalTid's thread and leaves its process: a globalPid."""
Row = dict[str, Any]


def read_report(path: Path, step_range: str = "step") -> Trace:
    """Kernels, copies and NVTX ranges of a report, a rank for each process and device in it.

    Raises UsageError for a file that is no such report, or that has no range of that name.
    """
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            return _Report(database, path, step_range).trace()
    except sqlite3.Error as error:
        raise UsageError(
            f"{path} is no readable export of nsys ({error}); make one with"
            " `nsys export --type sqlite`"
        ) from None


class _Report:
    """The tables of one report, read as they are asked for."""

    def __init__(self, database: sqlite3.Connection, path: Path, step_range: str) -> None:
        self._database = database
        self._path = path
        self._step_range = step_range
        self._strings = {row["id"]: row["value"] for row in self._rows("StringIds", "id", "value")}

    def trace(self) -> Trace:
        """All records, steps numbered."""
        spans = self._spans()
        kernels = self._device_rows("CUPTI_ACTIVITY_KIND_KERNEL")
        copies = self._device_rows("CUPTI_ACTIVITY_KIND_MEMCPY")
        launches = self._launches()
        ranks = self._ranks(spans, [*kernels, *copies])
        records: list[Record] = []
        for (process, device), rank in ranks.items():
            own = [replace(one, rank=rank) for one in spans.get(process, [])]
            records += own
            index = SpanIndexes(own)
            for row in (*kernels, *copies):
                if (row["globalPid"], row["deviceId"]) == (process, device):
                    records.append(self._device_record(row, rank, index, launches))
        return Trace(tuple(one for one in records if one.step is not None), self._path.stem)

    def _rows(self, table: str, *columns: str, required: bool = True) -> Iterator[Row]:
        """Rows with these columns, None for one that this version of nsys does not write."""
        known = {row[1] for row in self._database.execute(f"PRAGMA table_info({table})")}
        if not known:
            if required:
                raise UsageError(
                    f"{self._path} has no table {table}; profile with `nsys profile -t cuda,nvtx`"
                )
            return
        wanted = ", ".join(f'"{one}"' if one in known else f'NULL AS "{one}"' for one in columns)
        for row in self._database.execute(f"SELECT {wanted} FROM {table}"):
            yield dict(row)

    def _device_rows(self, table: str) -> list[Row]:
        columns = ("start", "end", "deviceId", "streamId", "globalPid", "correlationId")
        more = ("shortName", "demangledName", "bytes", "copyKind", "srcDeviceId", "dstDeviceId")
        return list(self._rows(table, *columns, *more, required=table.endswith("KERNEL")))

    def _launches(self) -> dict[tuple[int, int], Row]:
        """Calls of the CUDA API by process and correlation."""
        rows = self._rows(
            "CUPTI_ACTIVITY_KIND_RUNTIME", "start", "globalTid", "correlationId", required=False
        )
        return {(_process(row["globalTid"]), row["correlationId"]): row for row in rows}

    def _spans(self) -> dict[int, list[Record]]:
        """The NVTX ranges of every process that has steps, those within its steps."""
        columns = ("start", "end", "text", "textId", "globalTid")
        ranges: dict[int, list[Record]] = defaultdict(list)
        names: Counter[str] = Counter()
        for row in self._rows("NVTX_EVENTS", *columns):
            text = row["text"] or self._strings.get(row["textId"])
            if not text or row["end"] is None or row["globalTid"] is None:
                continue
            name, values = _parse(text)
            names[name] += 1
            record = Record(
                rank=values.get("rank", -1),
                kind="span",
                name="step" if name == self._step_range else name,
                start_ns=row["start"],
                end_ns=row["end"],
                track=row["globalTid"] & 0xFFFFFF,
                layer=values.get("layer"),
                chunk=values.get("chunk"),
                step=values.get("number"),
            )
            ranges[_process(row["globalTid"])].append(record)
        if self._step_range not in names:
            common = ", ".join(name for name, _ in names.most_common(8)) or "none"
            raise UsageError(
                f"{self._path} has no NVTX range named {self._step_range!r}; give --step-range,"
                f" one of: {common}"
            )
        return {process: _of_steps(found) for process, found in ranges.items()}

    def _ranks(self, spans: dict[int, list[Record]], rows: list[Row]) -> dict[tuple[int, int], int]:
        """A rank for each process and device: what its steps say, else as they come."""
        places = sorted({(row["globalPid"], row["deviceId"]) for row in rows})
        with_steps = [place for place in places if spans.get(place[0])]
        said = [spans[process][0].rank for process, _ in with_steps]
        if len(set(said)) < len(said) or -1 in said:
            said = list(range(len(with_steps)))
        return dict(zip(with_steps, said, strict=True))

    def _device_record(
        self, row: Row, rank: int, index: SpanIndexes, launches: dict[tuple[int, int], Row]
    ) -> Record:
        launch = launches.get((row["globalPid"], row["correlationId"]))
        if launch is None:
            launcher = index.step_at((row["start"] + row["end"]) // 2)
        else:
            launcher = index.at(launch["start"], launch["globalTid"] & 0xFFFFFF)
        is_copy = row["copyKind"] is not None
        return launched_in(
            launcher,
            rank=rank,
            kind="copy" if is_copy else "kernel",
            name=_copy_name(row) if is_copy else self._kernel_name(row),
            start_ns=row["start"],
            end_ns=row["end"],
            track=row["streamId"],
            num_bytes=row["bytes"] or 0,
        )

    def _kernel_name(self, row: Row) -> str:
        name = self._strings.get(row["shortName"]) or self._strings.get(row["demangledName"])
        return short_name(name or "unnamed")


def _of_steps(spans: Iterable[Record]) -> list[Record]:
    """The spans of a process within its steps, each with what it takes over from outer ones."""
    threads: dict[int, list[Record]] = defaultdict(list)
    for one in spans:
        threads[one.track].append(one)
    ranges = sorted((one for one in spans if one.name == "step"), key=lambda one: one.start_ns)
    numbered = [
        replace(one, step=place if one.step is None else one.step)
        for place, one in enumerate(ranges)
    ]
    steps = SpanIndex(numbered)
    found: list[Record] = []
    for of_thread in threads.values():
        resolved: list[Record] = []
        for one, outer in SpanIndex(of_thread).nested():
            around = resolved[outer] if outer >= 0 else None
            resolved.append(_within(one, around, steps.at(one.start_ns)))
        found += resolved
    return [one for one in found if one.step is not None]


def _within(span: Record, outer: Record | None, step: Record | None) -> Record:
    if step is not None:
        span = replace(span, rank=step.rank, step=step.step)
    if outer is None:
        return span
    return replace(
        span,
        stage=outer.name,
        layer=outer.layer if span.layer is None else span.layer,
        chunk=outer.chunk if span.chunk is None else span.chunk,
    )


def _parse(text: str) -> tuple[str, dict[str, int]]:
    """ "experts layer 3 chunk 1" -> "experts", {"layer": 3, "chunk": 1}."""
    name, *rest = text.split() or [text]
    pairs = {key: int(value) for key, value in pairwise(rest) if value.isdecimal()}
    return name, pairs


def _process(global_thread: int) -> int:
    return global_thread & _PROCESS


def _copy_name(row: Row) -> str:
    source, target = row["srcDeviceId"], row["dstDeviceId"]
    name = _COPY_KINDS.get(row["copyKind"], "copy")
    crosses = None not in (source, target) and source != target and name == "DtoD"
    return "PtoP" if crosses else name
