"""Reports of nsys made up here: SQLite files with the tables and columns that its export has."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (
    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL,
    correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL,
    shortName INTEGER NOT NULL, mangledName INTEGER, gridX INTEGER, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (
    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER,
    globalPid INTEGER, bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL, srcKind INTEGER,
    dstKind INTEGER, srcDeviceId INTEGER, srcContextId INTEGER, dstDeviceId INTEGER,
    dstContextId INTEGER, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (
    start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
    globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER);
CREATE TABLE NVTX_EVENTS (
    start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
    category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER,
    textId INTEGER, domainId INTEGER);
"""


class Report:
    """One report under way. Times in us; a process is a small number, its first thread too."""

    def __init__(self) -> None:
        self._strings: dict[str, int] = {}
        self._rows: dict[str, list[tuple[object, ...]]] = {}
        self._correlation = 0

    def range(self, process: int, text: str, begin: int, end: int, *, by_id: bool = False) -> None:
        """A pushed and popped NVTX range."""
        label, number = (None, self._string(text)) if by_id else (text, None)
        row = (begin * 1000, end * 1000, 59, None, None, None, label, _thread(process), None,
               number, 0)  # fmt: skip
        self._add("NVTX_EVENTS", row)

    def kernel(
        self, process: int, name: str, begin: int, end: int, *, launched: int | None,
        device: int | None = None, stream: int = 7,
    ) -> None:  # fmt: skip
        """A kernel, launched then, or by nobody that is known."""
        number = self._string(name)
        where = process if device is None else device
        row = (begin * 1000, end * 1000, where, 1, None, stream, self._launch(process, launched),
               _process(process), number, number, None, 1, None)  # fmt: skip
        self._add("CUPTI_ACTIVITY_KIND_KERNEL", row)

    def copy(
        self, process: int, kind: int, begin: int, end: int, *, launched: int, target: int
    ) -> None:
        """A copy of 4096 bytes to a device."""
        row = (begin * 1000, end * 1000, process, 1, 30, self._launch(process, launched),
               _process(process), 4096, kind, 2, 2, process, 1, target, 1, None)  # fmt: skip
        self._add("CUPTI_ACTIVITY_KIND_MEMCPY", row)

    def write(self, path: Path, *, without: str = "") -> Path:
        """The file, perhaps without one table."""
        self._rows["StringIds"] = [(number, text) for text, number in self._strings.items()]
        with closing(sqlite3.connect(path)) as database:
            database.executescript(SCHEMA)
            for table, rows in self._rows.items():
                marks = ", ".join("?" * len(rows[0]))
                database.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
            if without:
                database.execute(f"DROP TABLE {without}")
            database.commit()
        return path

    def _launch(self, process: int, begin: int | None) -> int:
        self._correlation += 1
        if begin is not None:
            row = (begin * 1000, begin * 1000 + 500, 0, _thread(process), self._correlation, 0, 0)
            self._add("CUPTI_ACTIVITY_KIND_RUNTIME", row)
        return self._correlation

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings) + 1)

    def _add(self, table: str, row: tuple[object, ...]) -> None:
        self._rows.setdefault(table, []).append(row)


def _process(process: int) -> int:
    return (1 << 56) | (1000 + process) << 24


def _thread(process: int) -> int:
    return _process(process) | (1000 + process)


def two_ranks(path: Path, *, marked: bool = True) -> Path:
    """Two processes, a step of 1000 us each: 300 us of communication, 100 of them hidden.

    With `marked` the ranges are Light-MoE's, else only one "step" a process.
    """
    report = Report()
    for process in (0, 1):
        rank = 1 - process  # the order of processes is not that of ranks
        text = f"step number 4 rank {rank}" if marked else "step"
        report.range(process, text, 0, 1000, by_id=marked)
        if marked:
            report.range(process, "pipeline layer 6", 90, 300)
            report.range(process, "dispatch chunk 1", 100, 120)
            report.range(process, "collective", 105, 115)
            report.range(process, "experts chunk 1", 130, 160)
            report.range(process, "combine chunk 1", 170, 180)
        report.kernel(process, "ncclDevKernel_SendRecv", 200, 400, launched=110, stream=20)
        report.kernel(process, "grouped_gemm_bf16", 300, 700, launched=140)
        report.copy(process, 10, 700, 800, launched=175, target=1 - process)
        report.copy(process, 1, 10, 20, launched=5, target=process)
        report.kernel(process, "warm_up", 1500, 1600, launched=1400)
    return report.write(path)
