"""What a trace is made of: intervals of spans, kernels and copies, of all ranks on one clock."""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Kind = Literal["span", "kernel", "copy"]
Role = Literal["compute", "communication", "other"]

STAGES = (
    "attention",
    "gate",
    "route",
    "dispatch",
    "experts",
    "combine",
    "mlp",
    "sampler",
)
"""Spans of what a step consists of, in order."""
TRANSPORTS = frozenset({"collective", "copy_engine"})
"""Spans around what a transport moves; the stage it moves that for is the span around them."""
EXCHANGE_STAGES = frozenset({"route", "dispatch", "exchange", "combine", *TRANSPORTS})
"""In "exchange" one chunk's dispatch and another's combine travel together."""
_COMMUNICATION_KERNELS = ("ncclDevKernel", "ncclKernel", "exchange_")
_STAGE_OF_KERNEL = {
    "exchange_combine": "combine",
    "exchange_give": "combine",
    "exchange_sum": "combine",
    "exchange_": "dispatch",
    "grouped_gemm": "experts",
    "quant_gemm": "experts",
    "hopper": "experts",
    "topk_gate": "gate",
    "router_logits": "gate",
    "sort_pairs": "route",
    "permute": "dispatch",
    "combine": "combine",
}
"""By the beginning of its name, where no span was open: kernels of a CUDA graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One interval on one track (a thread or a stream) of one rank. Times in ns since 1970.

    | field | meaning |
    |---|---|
    | stage | the span around a span; the span that launched a kernel or a copy |
    | step | number of the step it belongs to |
    | num_bytes | size of a copy |
    | bytes_sent [W] | of the span "step": what this rank sent to each rank in it |
    """

    rank: int
    kind: Kind
    name: str
    start_ns: int
    end_ns: int
    track: int = 0
    stage: str = ""
    layer: int | None = None
    chunk: int | None = None
    step: int | None = None
    num_bytes: int = 0
    bytes_sent: tuple[int, ...] = ()

    @property
    def role(self) -> Role:
        """Whether it computes, or moves data between ranks, or neither (inputs, a whole step).

        A kernel that waits for another rank's flag communicates. A copy does where it goes from
        device to device, or was launched for an exchange: without peer-to-peer that road leads
        through host memory.
        """
        if self.kind == "kernel":
            exchanges = self.name.startswith(_COMMUNICATION_KERNELS)
            return "communication" if exchanges else "compute"
        if self.kind == "copy":
            if self.name == "PtoP" or self.stage in EXCHANGE_STAGES:
                return "communication"
            return "compute" if self.name == "DtoD" else "other"
        if self.name in TRANSPORTS:
            return "communication"
        return "other" if self.name == "step" else "compute"


@dataclass(frozen=True)
class Trace:
    """The records of all ranks. `title` says what ran."""

    records: tuple[Record, ...]
    title: str = ""

    @property
    def source(self) -> Literal["kernels", "spans"]:
        """Whether times are the device's, or the host's because nothing ran on a device."""
        return "spans" if all(record.kind == "span" for record in self.records) else "kernels"

    @cached_property
    def steps(self) -> dict[tuple[int, int], list[Record]]:
        """Records by (rank, step), the span of the step among them."""
        found: dict[tuple[int, int], list[Record]] = defaultdict(list)
        for record in self.records:
            if record.step is not None:
                found[record.rank, record.step].append(record)
        return {key: found[key] for key in sorted(found)}

    @property
    def num_ranks(self) -> int:
        """Ranks that have a record."""
        return len({record.rank for record in self.records})

    def only_steps(self, steps: Iterable[int]) -> Trace:
        """The records of these steps."""
        kept = frozenset(steps)
        return Trace(tuple(one for one in self.records if one.step in kept), self.title)


class SpanIndex:
    """Which span was open at a time, on one thread. Spans of a thread nest."""

    def __init__(self, spans: Iterable[Record]) -> None:
        self._spans = sorted(spans, key=lambda one: (one.start_ns, -one.end_ns))
        self._starts = [one.start_ns for one in self._spans]
        self._outer: list[int] = []
        open_spans: list[int] = []
        for place, one in enumerate(self._spans):
            while open_spans and self._spans[open_spans[-1]].end_ns <= one.start_ns:
                open_spans.pop()
            self._outer.append(open_spans[-1] if open_spans else -1)
            open_spans.append(place)

    def nested(self) -> Iterator[tuple[Record, int]]:
        """Spans from the outermost on, each with the place here of the one around it, or -1."""
        return zip(self._spans, self._outer, strict=True)

    def at(self, time_ns: int) -> Record | None:
        """The innermost span open at a time."""
        place = bisect.bisect_right(self._starts, time_ns) - 1
        while place >= 0 and self._spans[place].end_ns <= time_ns:
            place = self._outer[place]
        return self._spans[place] if place >= 0 else None


class SpanIndexes:
    """The spans of one rank by thread. A launch of an unknown thread may be of any."""

    def __init__(self, spans: Sequence[Record]) -> None:
        threads: dict[int, list[Record]] = defaultdict(list)
        for one in spans:
            threads[one.track].append(one)
        self._threads = {track: SpanIndex(group) for track, group in threads.items()}
        self._steps = SpanIndex(one for one in spans if one.name == "step")

    def at(self, time_ns: int, thread: int | None) -> Record | None:
        """The innermost span of that thread; of the others the one that began last."""
        if thread in self._threads:
            return self._threads[thread].at(time_ns)
        found = [one for index in self._threads.values() if (one := index.at(time_ns))]
        return max(found, key=lambda one: one.start_ns, default=None)

    def step_at(self, time_ns: int) -> Record | None:
        """The step of that time, for what nobody is known to have launched."""
        return self._steps.at(time_ns)


def launched_in(
    launcher: Record | None,
    *,
    rank: int,
    kind: Kind,
    name: str,
    start_ns: int,
    end_ns: int,
    track: int,
    num_bytes: int = 0,
) -> Record:
    """A kernel or a copy, as part of the span in which it was launched."""
    stage, layer, chunk, step = "", None, None, None
    if launcher is not None:
        stage = launcher.stage if launcher.name in TRANSPORTS else launcher.name
        layer, chunk, step = launcher.layer, launcher.chunk, launcher.step
    if stage not in STAGES:  # launched by a whole step or graph: its name may say more
        stage = stage_of_kernel(name) or stage
    return Record(
        rank=rank,
        kind=kind,
        name=name,
        start_ns=start_ns,
        end_ns=end_ns,
        track=track,
        stage=stage,
        layer=layer,
        chunk=chunk,
        step=step,
        num_bytes=num_bytes,
    )


def stage_of_kernel(name: str) -> str:
    """The stage that one of our kernels serves; empty for others."""
    stages = (stage for begin, stage in _STAGE_OF_KERNEL.items() if name.startswith(begin))
    return next(stages, "")


def short_name(kernel: str) -> str:
    """A kernel's name without return type, namespaces, template and call arguments."""
    plain = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", plain, maxsplit=1)[0].rpartition("::")[2][:60] or kernel[:60]
