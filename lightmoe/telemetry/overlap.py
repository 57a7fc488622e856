"""How much of the communication a step hides: `overlap.json`, by arithmetic on intervals.

Per rank and step, communication is the union of what moves data between ranks (a kernel that waits
for another rank's flag included) and compute the union of all other kernels. Exposed is the first
without the second: the time in which the rank only waits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightmoe.errors import UsageError
from lightmoe.telemetry.intervals import length, subtract, union
from lightmoe.telemetry.nsys import read_report
from lightmoe.telemetry.records import Record, Trace
from lightmoe.telemetry.trace_file import read_trace

_NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class StepActivity:
    """What one rank did in one step, as sets of intervals (intervals.py), and its borders in ns."""

    rank: int
    step: int
    start_ns: int
    end_ns: int
    compute: np.ndarray
    communication: np.ndarray
    dispatch: np.ndarray
    combine: np.ndarray
    experts: np.ndarray

    @property
    def exposed(self) -> np.ndarray:
        """Communication that no compute hides."""
        return subtract(self.communication, self.compute)

    @property
    def step_ns(self) -> int:
        """How long the step took."""
        return self.end_ns - self.start_ns


def read_any(path: Path, step_range: str = "step") -> Trace:
    """An export of nsys (.sqlite) or a trace of ours (.json, .json.gz)."""
    if not path.is_file():
        raise UsageError(f"{path} is no file; give a trace or an export of nsys")
    if path.suffix in (".sqlite", ".db"):
        return read_report(path, step_range)
    return read_trace(path)


def step_activities(trace: Trace) -> list[StepActivity]:
    """Every step of every rank; UsageError where the trace has none."""
    activities = [
        _activity(rank, step, records, on_device=trace.source == "kernels")
        for (rank, step), records in trace.steps.items()
        if any(record.name == "step" for record in records)
    ]
    if not activities:
        raise UsageError("the trace has no step: no span or NVTX range named step is in it")
    return activities


def _activity(rank: int, step: int, records: Sequence[Record], *, on_device: bool) -> StepActivity:
    (whole, *_) = [record for record in records if record.kind == "span" and record.name == "step"]
    worked = worked_records(records, on_device=on_device)
    moves = [record for record in worked if record.role == "communication"]
    return StepActivity(
        rank=rank,
        step=step,
        start_ns=whole.start_ns,
        # Kernels may run on when the host has done with the step.
        end_ns=max(record.end_ns for record in (whole, *worked)),
        compute=_times(one for one in worked if one.role == "compute")
        if on_device
        else _host_compute(worked),
        communication=_times(moves),
        dispatch=_times(one for one in moves if one.stage in ("dispatch", "exchange")),
        combine=_times(one for one in moves if one.stage in ("combine", "exchange")),
        experts=_times(one for one in worked if "experts" in (one.stage, one.name)),
    )


def worked_records(records: Sequence[Record], *, on_device: bool) -> list[Record]:
    """The records of one rank that say when it worked: kernels and copies, or the host's spans."""
    worked = [record for record in records if (record.kind != "span") == on_device]
    return list(_in_turn(worked)) if on_device else worked


def _in_turn(kernels: Iterable[Record]) -> Iterator[Record]:
    """The same without the time in which a kernel waits for the one before it on its stream.

    Launched early (programmatic dependent launch), it is there before its turn.
    """
    free: dict[int, int] = {}
    for one in sorted(kernels, key=lambda record: (record.start_ns, record.end_ns)):
        begin = max(one.start_ns, free.get(one.track, one.start_ns))
        free[one.track] = max(one.end_ns, begin)
        yield one if begin == one.start_ns else replace(one, start_ns=min(begin, one.end_ns))


def _times(records: Iterable[Record]) -> np.ndarray:
    return union((record.start_ns, record.end_ns) for record in records)


def _host_compute(spans: Sequence[Record]) -> np.ndarray:
    """A thread that waits within a stage does not compute; another one may."""
    threads: dict[int, list[Record]] = defaultdict(list)
    for one in spans:
        threads[one.track].append(one)
    parts = [
        subtract(
            _times(one for one in of_thread if one.role == "compute"),
            _times(one for one in of_thread if one.role == "communication"),
        )
        for of_thread in threads.values()
    ]
    return union((begin, end) for part in parts for begin, end in part.tolist())


def overlap_of(trace: Trace) -> dict[str, Any]:
    """The content of overlap.json: means over ranks and steps, in ms.

    What carries one chunk's rows and another's results at once counts as dispatch and as combine.
    exposed_share is exposed over step time, hidden_fraction 1 - exposed over communication (None
    without any), bytes_per_link [W, W] what a rank sends to each in a step (None where nobody
    counted), `by_rank` the same shares rank by rank.
    """
    activities = step_activities(trace)
    sums = {
        "step_ms": [one.step_ns for one in activities],
        "dispatch_ms": [length(one.dispatch) for one in activities],
        "combine_ms": [length(one.combine) for one in activities],
        "experts_ms": [length(one.experts) for one in activities],
        "compute_ms": [length(one.compute) for one in activities],
        "comm_ms": [length(one.communication) for one in activities],
        "exposed_comm_ms": [length(one.exposed) for one in activities],
    }
    means = {name: float(np.mean(values)) / _NS_PER_MS for name, values in sums.items()}
    moved = means["comm_ms"]
    return {
        **{name: round(value, 6) for name, value in means.items()},
        "exposed_share": round(means["exposed_comm_ms"] / means["step_ms"], 6),
        "hidden_fraction": round(1 - means["exposed_comm_ms"] / moved, 6) if moved else None,
        "chunks": 1 + max((record.chunk or 0 for record in trace.records), default=0),
        "bytes_per_link": bytes_per_link(trace),
        "source": trace.source,
        "title": trace.title,
        "num_ranks": trace.num_ranks,
        "num_steps": len({one.step for one in activities}),
        "by_rank": _by_rank(activities),
    }


def bytes_per_link(trace: Trace) -> list[list[int]] | None:
    """Bytes from each rank to each in a step, mean over the steps; None where nobody counted."""
    counts: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for record in trace.records:
        if record.bytes_sent:
            counts[record.rank].append(record.bytes_sent)
    if not counts:
        return None
    return [np.mean(counts[rank], axis=0).round().astype(int).tolist() for rank in sorted(counts)]


def _by_rank(activities: Sequence[StepActivity]) -> list[dict[str, float]]:
    ranks: dict[int, list[StepActivity]] = defaultdict(list)
    for one in activities:
        ranks[one.rank].append(one)
    rows = []
    for rank, own in sorted(ranks.items()):
        step_ns = sum(one.step_ns for one in own)
        exposed_ns = sum(length(one.exposed) for one in own)
        rows.append(
            {
                "rank": rank,
                "step_ms": round(step_ns / len(own) / _NS_PER_MS, 6),
                "exposed_comm_ms": round(exposed_ns / len(own) / _NS_PER_MS, 6),
                "exposed_share": round(exposed_ns / step_ns, 6),
            }
        )
    return rows


def headline(overlap: dict[str, Any]) -> str:
    """One line for people."""
    hidden = overlap["hidden_fraction"]
    of_moves = "nothing travels" if hidden is None else f"{hidden:.0%} of communication hidden"
    source = " (from spans of the host)" if overlap["source"] == "spans" else ""
    return (
        f"exposed share {overlap['exposed_share']:.1%} of a step of {overlap['step_ms']:.2f} ms,"
        f" {of_moves}{source}"
    )
