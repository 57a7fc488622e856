"""One rank: its place in the group, its weights, its KV cache, and the steps it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from lightmoe.core import Batch, HostTierCounts, RankInfo, StepResult
from lightmoe.distributed.communicator import LOOPBACK, Communicator
from lightmoe.distributed.nccl import NcclCommunicator, nccl_environment
from lightmoe.distributed.peer_copies import PeerCopies
from lightmoe.kernels.checks import HALF_DTYPES
from lightmoe.kernels.library import library
from lightmoe.layers.attention import KVCache
from lightmoe.models.checkpoint import read_index
from lightmoe.models.decoder import Decoder, Parts, load_experts, read_expert
from lightmoe.models.weights import DummyReader, SafetensorsReader, WeightReader
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.moe.dispatch.peer_lane import PeerLane
from lightmoe.moe.load import LoadCounter
from lightmoe.moe.multiprocessors import multiprocessors_of
from lightmoe.moe.overflow import Overflow
from lightmoe.moe.skew import RoutingSkew
from lightmoe.telemetry.rank_recorder import RankRecorder
from lightmoe.worker.calibrate import choose_overlap
from lightmoe.worker.config import BLOCK_SIZE, WorkerConfig
from lightmoe.worker.host_tier import open_host_tier
from lightmoe.worker.inbox import Inbox
from lightmoe.worker.mover import HostCopy, Mover
from lightmoe.worker.peers import open_lanes
from lightmoe.worker.runner import Runner, RunningStep


class Worker:
    """A rank. `join` and `load` once, then `step` for ever."""

    def __init__(self, rank: int, config: WorkerConfig) -> None:
        self.rank = rank
        self._config = config
        self._device = torch.device(config.device_of(rank))
        self._communicator: Communicator | None = None
        self._nccl: NcclCommunicator | None = None
        self._runner: Runner | None = None
        self._mover: Mover | None = None
        self._load: LoadCounter | None = None
        self._group: ExpertGroup | None = None
        self._recorder: RankRecorder | None = None
        if config.trace is not None:
            self._recorder = RankRecorder(rank, config.trace, on_gpu=config.device != "cpu")
        # A row's bits may depend on how a product is cut over threads: one count for the whole run.
        torch.set_num_threads(config.num_threads)
        # TF32 would make float32 on a GPU something else than float32 on a CPU.
        torch.backends.cuda.matmul.allow_tf32 = False

    def join(self, port: int, host: str = LOOPBACK, store_host: str = LOOPBACK) -> None:
        """Meet the other ranks at the rendezvous, reachable at `host`; a rank alone has none."""
        num_ranks = self._config.placement.num_ranks
        if num_ranks > 1:
            self._communicator = Communicator(
                self.rank,
                num_ranks,
                port,
                self._config.timeout_seconds,
                host=host,
                store_host=store_host,
            )
        if self._device.index is not None:  # else the process has one card, or takes the first
            torch.cuda.set_device(self._device)
        if self._communicator is not None and self._config.transport == "nccl":
            self._nccl = self._join_nccl(self._communicator)

    def _join_nccl(self, control: Communicator) -> NcclCommunicator:
        config = self._config
        # In halves it runs beside the experts, which leave it as much (calibrate.py).
        halves = config.overlap == "halves"
        max_ctas = multiprocessors_of(self._device).exchange if halves else None
        os.environ.update(
            nccl_environment(
                self.rank,
                host=control.host,
                oversubscribed=config.oversubscribed,
                max_ctas=max_ctas,
            )
        )
        return NcclCommunicator(
            self.rank, control.num_ranks, control, self._device, config.timeout_seconds
        )

    def _open_lanes(self, dtype: torch.dtype) -> tuple[PeerLane, PeerLane] | tuple[None, None]:
        if self._communicator is None or self._config.transport != "copy_engine":
            return None, None
        return open_lanes(self._config, self._communicator, self._device, dtype)

    def _open_copies(self, blobs: torch.Tensor) -> PeerCopies | None:
        """The way for experts from card to card, where cards reach each other and experts move."""
        config = self._config
        on_cards = config.transport == "copy_engine" and not config.peers_on_host
        moves = config.num_free_slots and not config.host_copy
        if self._communicator is None or not on_cards or not moves:
            return None
        return PeerCopies(self._communicator, blobs)

    def load(self) -> RankInfo:
        """Read what this rank hosts, make its cache, and say what it has."""
        config = self._config
        dtype, device = getattr(torch, config.dtype), self._device
        if device.type == "cuda" and dtype in HALF_DTYPES:
            library().architecture_of(device)  # its errors before minutes of loading
        model = config.model
        lanes = self._open_lanes(dtype)
        group = ExpertGroup(
            rank=self.rank,
            placement=config.placement,
            communicator=self._communicator,
            nccl=self._nccl,
            peers=lanes[0],
            second_peers=lanes[1],
            route=config.route,
            layer_pairs=np.zeros(len(model.moe_layers), dtype=np.int64),
            deterministic=config.deterministic,
            nearness=config.nearness,
        )
        read = self._new_reader(dtype, device)
        if config.expert_slots is None:
            pool = load_experts(model, read, group, dtype, device, config.num_free_slots)
        else:
            pool = open_host_tier(config, read, group, dtype, device)
        exponent = config.routing_skew
        parts = Parts(
            config=model,
            read=read,
            group=group,
            pool=pool,
            deterministic=config.deterministic,
            skew=None if exponent is None else RoutingSkew(exponent, config.seed),
            overflow=self._new_overflow(group),
        )
        decoder = Decoder(parts, config.max_model_len)
        cache = KVCache(
            model.num_hidden_layers,
            config.num_kv_blocks,
            BLOCK_SIZE,
            *model.cache_shape,
            dtype,
            device,
        )
        with torch.inference_mode():
            overlap, why = choose_overlap(
                decoder,
                group,
                config.max_num_batched_tokens,
                config.overlap,
                is_recorded=config.max_recorded_tokens > 0,
            )
        decoder.set_overlap(overlap)
        # What is recorded for a trace of the routing is counted on the host, and fetched by it.
        use_graphs = not config.max_recorded_tokens and group.residency is None
        self._runner = Runner(decoder, group, cache, use_graphs=use_graphs)
        self._group = group
        self._load = decoder.load
        if config.max_recorded_tokens:
            decoder.load.record(config.max_recorded_tokens, model.num_experts_per_tok)
        host_copy = self._new_host_copy(pool.blobs) if config.host_copy else None
        copies = self._open_copies(pool.blobs)
        self._mover = Mover(group, pool.blobs, self._communicator, host_copy, copies)
        return RankInfo(
            rank=self.rank,
            kind=config.placement.rank_kinds[self.rank],
            device=str(device),
            num_slots=len(pool.blobs),
            weight_bytes=pool.num_bytes + model.dense_elements * pool.blobs.element_size(),
            num_kv_blocks=config.num_kv_blocks,
            pid=os.getpid(),
            overlap=why,
            expert_bytes=pool.num_bytes // max(len(pool.blobs), 1),
        )

    def step(self, batch: Batch) -> StepResult:
        """Run one step, and record it where it is one of those to be traced."""
        if self._recorder is None or not self._recorder.covers(batch.step):
            return self._step(batch)
        assert self._group is not None, "load before step"
        with self._recorder.step(batch.step) as note:
            result = self._step(batch)
            note.bytes_sent = self._group.take_bytes_sent()
        return result

    def finish(self) -> None:
        """Write the trace of a run that ends before all steps to be traced were run."""
        if self._recorder is not None:
            self._recorder.close()

    def follows(self, batch: Batch) -> bool:
        """Whether the step may begin while the one before it runs.

        Orders change what that one reads, unless the device keeps their turn, and what is traced or
        recorded of it must be taken first.
        """
        assert self._runner is not None, "load before step"
        assert self._mover is not None
        is_ordered = batch.orders is None or self._mover.may_follow(batch.orders)
        return not self._traces(batch) and is_ordered and self._runner.is_quick(batch)

    def begin(self, batch: Batch) -> RunningStep:
        """Enqueue a step, behind the one before it if it `follows`; a traced one ends in here."""
        if self._traces(batch):
            result = self.step(batch)
            return RunningStep(lambda: True, lambda: result)
        return self._begin(batch)

    def _traces(self, batch: Batch) -> bool:
        return self._recorder is not None and self._recorder.covers(batch.step)

    def _begin(self, batch: Batch) -> RunningStep:
        assert self._runner is not None, "load before step"
        assert self._mover is not None
        started = time.perf_counter()
        if batch.orders is not None:
            self._mover.begin(batch.orders)
        before = time.perf_counter() - started
        running = self._runner.begin(batch)
        return RunningStep(running.is_done, lambda: self._end(batch, running, before))

    def _step(self, batch: Batch) -> StepResult:
        return self._begin(batch).result()

    def _end(self, batch: Batch, running: RunningStep, before: float) -> StepResult:
        assert self._mover is not None
        result = running.result()
        if self._nccl is not None:
            self._nccl.check()  # an exchange that was ended leaves numbers that mean nothing
        return replace(
            result,
            seconds=result.seconds + before,
            arrivals=self._mover.arrivals(),
            routing=self._recorded(batch),
            host_tier=self._host_tier_counts(),
        )

    def _host_tier_counts(self) -> HostTierCounts | None:
        residency = None if self._group is None else self._group.residency
        return None if residency is None else residency.take_counts()

    def _recorded(self, batch: Batch) -> np.ndarray | None:
        """The experts of this rank's tokens [T, L, K], where they are recorded."""
        num_tokens = batch.tokens_per_rank[self.rank]
        if self._load is None or not self._config.max_recorded_tokens or not num_tokens:
            return None
        return self._load.take_routing(num_tokens)

    def _new_overflow(self, group: ExpertGroup) -> Overflow | None:
        """None for a rank alone, whose load is always the mean."""
        rule, communicator = self._config.overflow, self._communicator
        if rule is None or communicator is None:
            return None
        return Overflow(rule, group, communicator)

    def _new_reader(self, dtype: torch.dtype, device: torch.device) -> WeightReader:
        config = self._config
        if config.load_format == "dummy":
            return DummyReader(config.model, config.seed, dtype, device)
        return SafetensorsReader(read_index(config.folder), dtype, device)

    def _new_host_copy(self, blobs: torch.Tensor) -> HostCopy:
        """The checkpoint's files as the host's copy: all ranks of a node map the same pages.

        What is read becomes a blob by the code that filled the slots, so the bytes are equal.
        """
        read = self._new_reader(blobs.dtype, blobs.device)  # another thread's, with its own files
        scratch = blobs.new_empty(blobs.shape[1])

        def host_copy(layer: int, expert: int) -> torch.Tensor:
            read_expert(self._config.model, read, layer, expert, scratch)
            return scratch.view(torch.uint8)

        return host_copy


def run_steps(
    worker: Worker, receive: Callable[[], Batch | None], send: Callable[[StepResult], None]
) -> None:
    """Step until `receive` returns None: the driver has gone or wants the end.

    A plan that comes while a step runs is enqueued behind it, so that the device never waits for
    the host; only then is the step's result waited for and sent.
    """
    inbox = Inbox(receive)
    running: RunningStep | None = None
    with torch.inference_mode():
        while running is not None or inbox.first is not None:
            if running is None:
                running = worker.begin(inbox.take())
            plan = inbox.look(until=running.is_done)
            following = None
            if plan is not None and worker.follows(plan):
                following = worker.begin(inbox.take())
            send(running.result())
            running = following
    worker.finish()
