"""Ranks of transport copy_engine as threads without a GPU: the kernels of rows run on the host, and
what shares and what waits is done here.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightmoe.distributed.peers import Road
from lightmoe.kernels import reference
from lightmoe.moe.dispatch import CopyEngineDispatcher, Dispatcher, ExpertGroup, LocalDispatcher
from lightmoe.moe.dispatch.arena import ArenaLayout
from lightmoe.moe.dispatch.peer_lane import PeerLane
from lightmoe.moe.dispatch.summing import SummingLane
from lightmoe.moe.experts import Experts, SlotPool
from lightmoe.moe.gate import Gate
from lightmoe.moe.layer import MoELayer
from lightmoe.moe.load import LoadCounter
from lightmoe.moe.overlap_model import Overlap, chunk_of
from lightmoe.moe.placement import Placement
from lightmoe.quant.packing import ExpertLayout
from tests.kernels.drivers import HERE
from tests.kernels.exchange_cases import (
    POSITION_BITS,
    ChunkArgs,
    CombineArgs,
    CountArgs,
    GiveArgs,
    PlacesArgs,
    PullArgs,
    SumArgs,
)
from tests.kernels.route_cases import compile_host
from tests.moe.cases import LayerWeights

DTYPE = torch.bfloat16
CPU = torch.device("cpu")
_WAIT_SECONDS = 20
Answer = TypeVar("Answer")


def view(address: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory as a tensor."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    memory = (ctypes.c_char * num_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Arenas:
    """PeerMemory of all ranks, as one of them has it."""

    def __init__(self, arenas: list[Tensor], rank: int, road: Road) -> None:
        self.road = road
        self.arena = arenas[rank]
        self.addresses = [arena.data_ptr() for arena in arenas]


class LateUpload:
    """The upload that is hardest to get right: from its beginning on nothing can be read any more,
    and a chunk is there when it was waited for, after some time.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._parts: Sequence[tuple[Tensor, Tensor]] = ()
        self._rows: list[slice] = []

    def of_another_lane(self) -> LateUpload:
        return LateUpload(self._random.randrange(1 << 30))

    @property
    def num_chunks(self) -> int:
        return len(self._rows)

    def begin(
        self, parts: Sequence[tuple[Tensor, Tensor]], num_tokens: int, num_chunks: int
    ) -> None:
        self._parts = parts
        self._rows = [chunk_of(num_tokens, chunk, num_chunks) for chunk in range(num_chunks)]
        for _, target in parts:
            target.view(torch.uint8)[:num_tokens].fill_(0xFF)

    def wait(self, chunk: int) -> None:
        time.sleep(self._random.random() * 2e-3)
        for source, target in self._parts:
            target[self._rows[chunk]] = source[self._rows[chunk]]


def compile_kernels(folder: Path) -> ctypes.CDLL:
    """Those of emulator/exchange.cpp, compiled into a folder."""
    source: Path = HERE / "emulator/exchange.cpp"
    library = compile_host(source, folder / "exchange.so", f"-I{HERE / 'emulator/cuda'}")
    kernels = ctypes.CDLL(str(library))
    for name in ("run_pull", "run_give", "run_sum", "run_combine", "run_count"):
        getattr(kernels, name).restype = ctypes.c_bool
    return kernels


class HostLibrary:
    """liblight_ops for W ranks in one process: `kernels` are those of emulator/exchange.cpp."""

    def __init__(self, kernels: ctypes.CDLL, num_ranks: int) -> None:
        self._kernels = kernels
        self._lock = threading.Lock()  # one CTA at a time
        self._all = threading.Barrier(num_ranks, timeout=_WAIT_SECONDS)

    def launch(self, name: str, device: torch.device, **arguments: Any) -> None:
        """Run it now."""
        assert device == CPU
        try:
            getattr(self, f"_{name}")(**arguments)
        except BaseException:
            self._all.abort()
            raise

    def _run(self, name: str, *arguments: Any) -> None:
        with self._lock:
            assert getattr(self._kernels, name)(*arguments)

    def _exchange_meet(self, flags: tuple) -> None:
        self._all.wait()

    def _exchange_share(self, **given: Any) -> None:
        arenas, tokens = given["flags"][0], given["num_rows"]
        per_token, num_experts = given["num_experts_per_token"], given["num_experts"]
        experts = view(given["experts"], torch.int32, tokens * per_token)
        if given["prefixes"]:
            index = view(given["pair_index"], torch.int32, tokens * per_token)
            prefixes = view(given["prefixes"], torch.int32, given["num_chunks"], num_experts + 1)
        else:
            order = experts.argsort(stable=True)
            index = torch.empty_like(experts).scatter_(0, order, torch.arange(len(order)).int())
            counts = experts.long().bincount(minlength=num_experts)
            prefixes = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()[None]
        spans = [chunk_of(tokens, number, len(prefixes)) for number in range(len(prefixes))]
        sizes = torch.tensor([span.stop - span.start for span in spans])
        chunk = torch.arange(len(spans)).repeat_interleave(sizes * per_token)
        place = index - prefixes[chunk, experts.long()]
        for arena in arenas:
            at = arena + given["choice_offset"]
            view(at, torch.int32, len(experts))[:] = experts << POSITION_BITS | place
            for number, prefix in enumerate(prefixes):
                row = number * len(arenas) * (num_experts + 1)
                at = arena + given["prefix_offset"] + 4 * row
                view(at, torch.int32, num_experts + 1)[:] = prefix
            if given["weights"]:
                weights = view(given["weights"], torch.float32, len(experts))
                view(arena + given["weight_offset"], torch.float32, len(experts))[:] = weights
        if given["load"]:
            counts = experts.long().bincount(minlength=num_experts)
            view(given["load"], torch.int32, num_experts).add_(counts)
        if given["hidden"]:
            ctypes.memmove(given["published"], given["hidden"], tokens * given["width_bytes"])
        self._all.wait()

    def _permute_int8(self, **given: Any) -> None:
        shape = (given["num_rows"], given["width"])
        codes, scales = reference.permute_int8(
            view(given["rows"], DTYPE, *shape), torch.arange(shape[0])
        )
        view(given["output"], torch.int8, *shape)[:] = codes
        view(given["scales"], torch.float32, shape[0])[:] = scales

    def _exchange_pull(self, **given: Any) -> None:
        args = PullArgs(
            _addresses(PullArgs, "hidden", given["hidden"]),
            _addresses(PullArgs, "results", given["results"]),
            _chunk(given["chunk"]),
            *(
                given[name]
                for name in ("weights", "pair_weight", "output_rows", "prefixes", "rows")
            ),
            *(given[name] for name in ("scale_offset", "width_bytes")),
        )
        self._run("run_pull", ctypes.byref(args), given["as_int8"])

    def _exchange_give(self, **given: Any) -> None:
        args = GiveArgs(*(given[name] for name, _ in GiveArgs._fields_))
        self._run("run_give", ctypes.byref(args))

    def _exchange_sum(self, **given: Any) -> None:
        args = SumArgs(
            given["pairs"],
            _addresses(SumArgs, "sums", given["sums"]),
            _chunk(given["chunk"]),
            given["scale_offset"],
            given["width_bytes"],
        )
        self._run("run_sum", ctypes.byref(args), False, given["as_int8"])

    def _exchange_combine(self, **given: Any) -> None:
        if not given["num_tokens"]:
            return
        args = CombineArgs(
            _addresses(CombineArgs, "results", given["results"]),
            PlacesArgs(*given["places"]),
            *(given[name] for name in ("prefixes", "choices", "weights", "output", "scale_offset")),
            *(given[name] for name in ("first_token", "num_tokens", "rank")),
            *(given[name] for name in ("num_experts_per_token", "width_bytes", "together")),
            given["summed"],
        )
        self._run("run_combine", ctypes.byref(args), False, given["as_int8"])

    def _exchange_count(self, **given: Any) -> None:
        args = CountArgs(
            _chunk(given["chunk"]), given["rows_sent"], given["results_sent"], given["summed"]
        )
        self._run("run_count", ctypes.byref(args))


def _addresses(kind: type[ctypes.Structure], name: str, given: list[int]) -> ctypes.Array:
    return dict(kind._fields_)[name](*given)


def _chunk(given: tuple) -> ChunkArgs:
    begin, count, places, choices, stride, rank, per_token = given
    numbers = dict(ChunkArgs._fields_)["begin"]
    return ChunkArgs(
        numbers(*begin),
        numbers(*count),
        PlacesArgs(*places),
        choices,
        stride,
        rank,
        len(begin),
        per_token,
    )


def open_lanes(layout: ArenaLayout, road: Road, upload: Any = None) -> list[PeerLane]:
    """A lane a rank, whose arenas are full of bytes that mean nothing."""
    arenas = [
        torch.full((layout.num_bytes,), 0xC7, dtype=torch.uint8) for _ in range(layout.num_ranks)
    ]
    kind = SummingLane if layout.summed else PeerLane
    upload = upload or LateUpload()
    streams: Any = SimpleNamespace(stream=object(), beside=object(), upload=upload)
    return [
        kind(layout, Arenas(arenas, rank, road), rank, 1, DTYPE, CPU, 1.0, like=streams)
        for rank in range(layout.num_ranks)
    ]


def layer_of(
    weights: LayerWeights,
    placement: Placement,
    rank: int,
    lanes: Sequence[PeerLane] = (),
    num_chunks: int = 1,
) -> tuple[MoELayer, ExpertGroup]:
    """The layer as one rank has it, with a lane for each half; without lanes it is alone."""
    num_experts, expert_width, width = weights.gates.shape
    pairs = np.zeros(1, dtype=np.int64)
    peers = lanes[0] if lanes else None
    group = ExpertGroup(rank, placement, None, "none", pairs, deterministic=False, peers=peers)
    blobs = ExpertLayout(width, expert_width)
    pool = SlotPool(placement.num_slots(rank), blobs, DTYPE, CPU)
    for _, expert, slot in placement.hosted(rank):
        parts = (weights.gates[expert], weights.ups[expert], weights.downs[expert])
        blobs.write(pool.blobs[slot], *(part.to(DTYPE) for part in parts))
    experts = Experts(pool)
    dispatchers: list[Dispatcher] = [
        CopyEngineDispatcher(group, 0, lane, experts.tokens_per_tile) for lane in lanes
    ] or [LocalDispatcher(group, 0, CPU, experts.tokens_per_tile)]
    for dispatcher in dispatchers:
        dispatcher.stream = None  # one after the other: there are no streams here
    gate = Gate(weights.router.to(DTYPE), weights.num_per_token, renormalize=True)
    layer = MoELayer(
        0,
        gate,
        LoadCounter(1, num_experts, CPU),
        dispatchers[0],
        experts,
        overlap=Overlap(num_chunks=num_chunks),
        second_dispatcher=dispatchers[-1],
    )
    return layer, group


def on_threads(calls: Sequence[Callable[[], Answer]]) -> list[Answer]:
    """What each rank's call returns, made all at once; a failure is raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        started = [pool.submit(call) for call in calls]
    failures = [failure for one in started if (failure := one.exception()) is not None]
    for failure in failures:
        if not isinstance(failure, threading.BrokenBarrierError):
            raise failure
    assert not failures, "a rank waited for others in vain"
    return [one.result() for one in started]
