"""Traces made up here, with times and shares that one can work out by hand."""

from __future__ import annotations

from typing import Any

from lightmoe.telemetry.records import Kind, Record, Trace

BASE_NS = 1_795_000_000_000_000_000
"""Of the present: floats that hold it lose hundreds of nanoseconds."""


def record(
    name: str, begin: int, end: int, *, rank: int = 0, kind: Kind = "kernel", **values: Any
) -> Record:
    """A record of step 0 unless told otherwise; times in us after BASE_NS."""
    values = {"step": 0, "track": 7 if kind != "span" else 100 + rank} | values
    return Record(
        rank=rank,
        kind=kind,
        name=name,
        start_ns=BASE_NS + 1000 * begin,
        end_ns=BASE_NS + 1000 * end,
        **values,
    )


def gpu_trace(
    num_ranks: int = 2, num_chunks: int = 2, *, overlapped: bool = True, num_steps: int = 1
) -> Trace:
    """A step of three layers: attention 100 us, experts 300, dispatch 100 and combine 200.

    Overlapped, dispatch of one chunk and combine of another run beside the experts.
    """
    records: list[Record] = []
    for rank in range(num_ranks):
        clock = 10 * rank
        for step in range(num_steps):
            begin = clock
            for layer in range(3):
                own = {"rank": rank, "layer": layer, "step": step}
                records.append(record("flash", clock, clock + 100, stage="attention", **own))
                clock = _moe(records, clock + 100, num_chunks, overlapped, own)
            records.append(record("step", begin, clock, kind="span", rank=rank, step=step))
    return Trace(tuple(records), "made up")


def _moe(
    records: list[Record], clock: int, num_chunks: int, overlapped: bool, own: dict[str, Any]
) -> int:
    dispatch, experts, combine = (size // num_chunks for size in (100, 300, 200))
    lane = clock
    for chunk in range(num_chunks):
        also = own | {"chunk": chunk}
        begin = lane if overlapped else clock
        lane = begin + dispatch
        records.append(
            record("exchange_pull", begin, lane, stage="dispatch", **also | {"track": 20})
        )
        begin = max(lane, clock)
        clock = begin + experts
        records.append(record("grouped_gemm_bf16", begin, clock, stage="experts", **also))
        if not overlapped:
            records.append(
                record("ncclDevKernel_SendRecv", clock, clock + combine, stage="combine", **also)
            )
            clock += combine
    if overlapped:
        for chunk in range(num_chunks):
            also = own | {"chunk": chunk, "track": 21}
            begin = clock - (num_chunks - 1 - chunk) * combine
            records.append(
                record("ncclDevKernel_SendRecv", begin, begin + combine, stage="combine", **also)
            )
        clock += combine
    return clock


def in_halves(num_ranks: int = 1, num_layers: int = 6) -> Trace:
    """A step of two halves: a layer is 200 us of attention, then 400 of experts.

    The second half's experts run 100 us on beside the next layer's attention, and are combined
    there. What the halves share of a layer does not say which one it is.
    """
    records: list[Record] = []
    for rank in range(num_ranks):
        for layer in range(num_layers):
            begin = 10 * rank + 600 * layer
            own: dict[str, Any] = {"rank": rank}
            records += [
                record("flash", begin, begin + 200, stage="attention", layer=layer, **own),
                record("grouped_gemm", begin + 200, begin + 600, stage="experts", **own),
                record("grouped_gemm", begin + 500, begin + 700, stage="experts", track=8, **own),
                record(
                    "exchange_combine", begin + 700, begin + 800, stage="combine", track=9, **own
                ),
            ]
        records.append(record("step", 0, 50, kind="span", rank=rank))
    return Trace(tuple(records), "made up, in halves")
