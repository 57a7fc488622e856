"""What ran on a rank's device, from the JSON that torch.profiler writes (kineto's format)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightmoe.errors import MachineError
from lightmoe.telemetry.records import Kind, Record, SpanIndexes, launched_in, short_name

_LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
_DEVICE_KINDS: dict[str, Kind] = {
    "kernel": "kernel",
    "gpu_memset": "kernel",
    "gpu_memcpy": "copy",
}


def device_records(document: Mapping[str, Any], rank: int, spans: Sequence[Record]) -> list[Record]:
    """Kernels and copies of the steps that have spans, each with the span that launched it.

    A kernel belongs to the step in which it was launched, even if it runs longer. Raises
    MachineError where none was launched in any step: then the two clocks differ.
    """
    base = int(document.get("baseTimeNanoseconds", 0))
    events = [event for event in document["traceEvents"] if event.get("ph") == "X"]
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    index = SpanIndexes(spans)
    records = []
    for event in events:
        kind = _DEVICE_KINDS.get(event.get("cat", ""))
        if kind is None:
            continue
        start, end = _times(event, base)
        launch = launches.get(event["args"].get("correlation"))
        if launch is None:
            launcher = index.step_at((start + end) // 2)
        else:
            launcher = index.at(_times(launch, base)[0], _thread(launch))
        records.append(
            launched_in(
                launcher,
                rank=rank,
                kind=kind,
                name=_name(event, kind),
                start_ns=start,
                end_ns=end,
                track=int(event["args"].get("stream", 0)),
                num_bytes=int(event["args"].get("bytes", 0)) if kind == "copy" else 0,
            )
        )
    of_steps = [record for record in records if record.step is not None]
    if records and not of_steps:
        raise MachineError(
            f"rank {rank}: none of {len(records)} kernels was launched within a step, so the"
            " clocks of torch.profiler and of the spans differ; profile with --nsys"
        )
    return of_steps


def _times(event: Mapping[str, Any], base: int) -> tuple[int, int]:
    start = base + round(event["ts"] * 1000)
    return start, start + round(event.get("dur", 0) * 1000)


def _thread(event: Mapping[str, Any]) -> int | None:
    thread = event.get("tid")
    return thread if isinstance(thread, int) else None


def _name(event: Mapping[str, Any], kind: Kind) -> str:
    name = str(event["name"])
    if kind == "copy":
        match = re.match(r"Memcpy (\w+)", name)
        return match[1] if match else name
    return "memset" if name.startswith("Memset") else short_name(name)
