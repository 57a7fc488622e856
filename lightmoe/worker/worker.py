"""One rank: its place in the group, its weights, its KV cache, and the steps it runs."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch

from lightmoe.core import Batch, RankInfo, StepResult
from lightmoe.distributed.communicator import Communicator
from lightmoe.kernels.checks import HALF_DTYPES
from lightmoe.kernels.library import library
from lightmoe.layers.attention import KVCache
from lightmoe.models.checkpoint import read_index
from lightmoe.models.decoder import Decoder, Parts, load_experts
from lightmoe.models.weights import DummyReader, SafetensorsReader, WeightReader
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.worker.config import BLOCK_SIZE, WorkerConfig
from lightmoe.worker.runner import Runner


class Worker:
    """A rank. `join` and `load` once, then `step` for ever."""

    def __init__(self, rank: int, config: WorkerConfig) -> None:
        self.rank = rank
        self._config = config
        self._communicator: Communicator | None = None
        self._runner: Runner | None = None
        # A row's bits may depend on how a product is cut over threads: one count for the whole run.
        torch.set_num_threads(config.num_threads)
        # TF32 would make float32 on a GPU something else than float32 on a CPU.
        torch.backends.cuda.matmul.allow_tf32 = False

    def join(self, port: int) -> None:
        """Meet the other ranks at the rendezvous; a rank alone has none."""
        num_ranks = self._config.placement.num_ranks
        if num_ranks > 1:
            self._communicator = Communicator(
                self.rank, num_ranks, port, self._config.timeout_seconds
            )

    def load(self) -> RankInfo:
        """Read what this rank hosts, make its cache, and say what it has."""
        config = self._config
        dtype, device = getattr(torch, config.dtype), torch.device(config.device)
        if device.type == "cuda" and dtype in HALF_DTYPES:
            library().architecture_of(device)  # its errors before minutes of loading
        model = config.model
        group = ExpertGroup(
            rank=self.rank,
            placement=config.placement,
            communicator=self._communicator,
            route=config.route,
            layer_pairs=np.zeros(len(model.moe_layers), dtype=np.int64),
            deterministic=config.deterministic,
        )
        read: WeightReader
        if config.load_format == "dummy":
            read = DummyReader(model, config.seed, dtype, device)
        else:
            read = SafetensorsReader(read_index(config.folder), dtype, device)
        pool = load_experts(model, read, group, dtype, device)
        parts = Parts(
            config=model, read=read, group=group, pool=pool, deterministic=config.deterministic
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
        self._runner = Runner(decoder, group, cache)
        return RankInfo(
            rank=self.rank,
            kind=config.placement.rank_kinds[self.rank],
            device=config.device,
            num_slots=config.placement.num_slots(self.rank),
            weight_bytes=pool.num_bytes + model.dense_elements * pool.blobs.element_size(),
            num_kv_blocks=config.num_kv_blocks,
            pid=os.getpid(),
        )

    def step(self, batch: Batch) -> StepResult:
        """Run one step."""
        assert self._runner is not None, "load before step"
        return self._runner.step(batch)


def run_steps(
    worker: Worker, receive: Callable[[], Batch | None], send: Callable[[StepResult], None]
) -> None:
    """Step until `receive` returns None: the driver has gone or wants the end."""
    with torch.inference_mode():
        while (batch := receive()) is not None:
            send(worker.step(batch))
