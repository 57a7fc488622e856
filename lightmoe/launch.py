"""Wiring: a LaunchConfig becomes ranks, an engine and, for `lightmoe launch`, a server.

Every `auto` is resolved here, once, and said in one line with its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from lightmoe.config import LaunchConfig
from lightmoe.core import ModelInfo
from lightmoe.engine.engine import Engine, SchedulerConfig
from lightmoe.errors import CheckpointError, LightMoEError, MachineError, UsageError
from lightmoe.machine import Driver, free_ram_bytes, port_holder, read_driver
from lightmoe.models.checkpoint import check_tensors, read_index
from lightmoe.models.config import ModelConfig, read_config
from lightmoe.models.find import find_model, generation_defaults
from lightmoe.server.app import allowed_hosts_for, create_app
from lightmoe.server.tokenizer import Tokenizer
from lightmoe.worker.config import WorkerConfig
from lightmoe.worker.ray_cluster import RayConfig
from lightmoe.worker.ray_group import Progress, RayWorkerGroup
from lightmoe.worker.sizing import Demand, Sizing, size_ranks

DRAIN_SECONDS = 1.5
"""Running requests get this long after Ctrl-C; then they end with an error event."""

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_USABLE_SHARE = 0.8  # of the free memory: torch, Ray and the operating system want some too
_USABLE_GPU_SHARE = 0.9  # of a card's: the CUDA context, and what a step needs for a moment
_RANK_OVERHEAD_BYTES = 300 << 20  # a process with torch and Ray in it, measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What `auto` became, and the sentence that says why."""

    device: str
    dtype: str
    transport: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Ranks with their weights loaded, what they serve, and the line that says what was chosen."""

    group: RayWorkerGroup
    model: ModelInfo
    tokenizer: Tokenizer | None
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A running engine and what its front needs."""

    engine: Engine
    tokenizer: Tokenizer | None
    summary: str


def resolve(config: LaunchConfig, driver: Driver) -> Resolved:
    """Device, dtype and transport; UsageError or MachineError where a wish cannot be met."""
    device, reason = _resolve_device(config, driver)
    turing = device == "cuda" and driver.gpus[0].compute_capability < (8, 0)
    dtype: str = config.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "float16" if turing else "bfloat16"
    if dtype == "bfloat16" and turing:
        raise UsageError(f"{driver.gpus[0].name} has no bfloat16; use --dtype float16")
    transport = "local" if config.gpus == 1 else "gloo"
    if config.transport not in ("auto", transport):
        raise UsageError(f"transport {config.transport} does not fit one rank; take auto or local")
    return Resolved(device=device, dtype=dtype, transport=transport, reason=reason)


def kernels_for(resolved: Resolved, driver: Driver) -> str:
    """The kernels that device and dtype lead to, and why; MachineError where they are missing."""
    if resolved.device == "cpu":
        return "reference (the CPU)"
    # Imported here: without a GPU the driver's process needs no torch.
    from lightmoe.kernels.choice import choose_kernels

    return choose_kernels(resolved.dtype, driver.gpus[0].compute_capability)


def _resolve_device(config: LaunchConfig, driver: Driver) -> tuple[str, str]:
    if config.device == "cpu":
        return "cpu", "the CPU was asked for"
    if config.gpus > 1:
        if config.device == "cuda":
            raise UsageError(
                f"--device cuda with {config.gpus} ranks needs an exchange between GPUs, which this"
                " version does not have; use --gpus 1, or --device cpu for ranks on the CPU"
            )
        found = f"{len(driver.gpus)} GPU(s) found, but " if driver.gpus else ""
        return "cpu", f"{found}several ranks exchange over gloo on the CPU in this version"
    missing = _why_no_cuda(driver)
    if missing is None:
        return "cuda", f"one rank on {driver.gpus[0].name}"
    if config.device == "cuda":
        raise MachineError(f"--device cuda: {missing}; see `lightmoe doctor`, or use --device cpu")
    return "cpu", missing


def _why_no_cuda(driver: Driver) -> str | None:
    """Why CUDA cannot be used here, None if it can. torch is asked only where there is a card."""
    if driver.error is not None:
        return f"the NVIDIA driver does not answer ({driver.error})"
    if not driver.gpus:
        return "no GPU found"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} cannot use the GPU under driver {driver.version}"
    return None


def start_engine(config: LaunchConfig, progress: Progress) -> Launched:
    """Start the ranks, and an engine over them."""
    started = start_workers(config, progress)
    limits = SchedulerConfig(
        max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
    )
    engine = Engine(started.model, started.group, limits)
    engine.start()
    return Launched(engine=engine, tokenizer=started.tokenizer, summary=started.summary)


def start_workers(config: LaunchConfig, progress: Progress) -> Started:
    """Find the model, size the ranks, start them and load."""
    folder = find_model(config.model)
    model = read_config(folder)
    if config.load_format == "auto":
        check_tensors(read_index(folder), model)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{folder.name}'s tokenizer has {tokenizer.vocab_size} tokens, the model"
            f" {model.vocab_size}; they belong to different models"
        )
    driver = read_driver()
    resolved = resolve(config, driver)
    kernels = kernels_for(resolved, driver)
    sizing = size_ranks(_demand(config, model, resolved, driver))
    workers = RayWorkerGroup(
        WorkerConfig(
            model=model,
            folder=folder,
            load_format=config.load_format,
            placement=sizing.placement,
            route=config.route,
            device=resolved.device,
            dtype=resolved.dtype,
            max_model_len=sizing.max_model_len,
            num_kv_blocks=sizing.num_kv_blocks,
            num_threads=1,
            seed=config.seed,
            deterministic=config.deterministic == "on",
        ),
        RayConfig(address=config.address, gpus_per_rank=int(resolved.device == "cuda")),
        progress,
    )
    return Started(
        group=workers,
        model=_model_info(config, folder, model, sizing),
        tokenizer=tokenizer,
        summary=_summary(config, resolved, kernels, sizing),
    )


def _demand(config: LaunchConfig, model: ModelConfig, resolved: Resolved, driver: Driver) -> Demand:
    longest = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise UsageError(
            f"--max-model-len {config.max_model_len} is over the {longest} positions of the model;"
            f" give at most {longest}"
        )
    return Demand(
        model=model,
        num_ranks=config.gpus,
        num_spares=config.num_spares,
        element_bytes=_ELEMENT_BYTES[resolved.dtype],
        rank_bytes=_rank_bytes(config, resolved, driver),
        max_model_len=config.max_model_len or longest,
        max_num_seqs=config.max_num_seqs,
        on_cpu=resolved.device == "cpu",
    )


def _rank_bytes(config: LaunchConfig, resolved: Resolved, driver: Driver) -> int:
    """What a rank may use for weights and cache: a share of what is free, or the limit if less."""
    if resolved.device == "cuda":
        share = int(driver.gpus[0].free_bytes * _USABLE_GPU_SHARE)
    else:
        free = free_ram_bytes()
        if free is None:
            raise MachineError("this system does not tell its free memory; give --memory-limit")
        share = int(free * _USABLE_SHARE) // config.gpus - _RANK_OVERHEAD_BYTES
        if share <= 0:
            needed = config.gpus * _RANK_OVERHEAD_BYTES / _USABLE_SHARE
            raise MachineError(
                f"{free / 2**30:.1f} GiB of memory are free, {config.gpus} ranks need"
                f" {needed / 2**30:.1f} GiB before any weight;"
                " use fewer ranks or close other programs"
            )
    limit = config.memory_limit_bytes
    return share if limit is None else min(share, limit)


def _model_info(
    config: LaunchConfig, folder: Path, model: ModelConfig, sizing: Sizing
) -> ModelInfo:
    return ModelInfo(
        name=config.served_model_name or folder.name,
        folder=str(folder),
        architecture=model.architecture,
        num_layers=len(model.moe_layers),
        num_experts=model.num_experts,
        vocab_size=model.vocab_size,
        max_model_len=sizing.max_model_len,
        eos_token_ids=model.eos_token_ids,
        generation_defaults=generation_defaults(folder),
        dummy_weights=config.load_format == "dummy",
    )


def _summary(config: LaunchConfig, resolved: Resolved, kernels: str, sizing: Sizing) -> str:
    kinds = f"{config.num_homes} homes + {config.num_spares} spares"
    ranks = f"{config.gpus} ranks, all alike" if config.placement == "spread" else kinds
    slots = [sizing.placement.num_slots(rank) for rank in range(config.gpus)]
    return (
        f"{resolved.device} ({resolved.reason}), {resolved.dtype}, transport {resolved.transport},"
        f" route {config.route}, placement {config.placement}: {ranks},"
        f" {min(slots)}-{max(slots)} experts a rank; context {sizing.max_model_len},"
        f" KV cache {sizing.cache_bytes / 2**20:.0f} MiB a rank; kernels: {kernels},"
        f" deterministic {config.deterministic}"
    )


def listen(host: str, port: int) -> socket.socket:
    """Bind before anything is loaded; MachineError names who holds the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Two sockets may be bound to one port; only listening makes it ours.
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise MachineError(f"cannot listen on {host} ({error}); give another --host") from error
        holder = port_holder(port)
        by = f" by {holder}" if holder else ""
        raise MachineError(
            f"port {port} of {host} cannot be used ({error.strerror}{by}); give another --port"
        ) from error
    return listener


def serve(config: LaunchConfig, progress: Progress, announce: Callable[[str], None]) -> None:
    """Start everything and serve until SIGINT or SIGTERM; raises the error if a rank is lost."""
    started = time.perf_counter()
    with (
        contextlib.closing(listen(config.host, config.port)) as listener,
        _interrupted_by_signals(),
    ):
        launched = start_engine(config, progress)
        try:
            asyncio.run(_serve(config, launched, listener, announce, started))
        finally:
            launched.engine.close()
        if launched.engine.failure is not None:
            raise launched.engine.failure


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Both signals stop a start by an exception, so that ranks are not left behind.

    SIGINT does so by itself, unless a script started us in the background: there it is ignored.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    """uvicorn, with signals left to us: it would cut open streams without a word."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: `_serve` handles signals on the event loop."""
        yield

    def stop(self) -> None:
        """Accept no more, finish what is open, return from serve()."""
        self.should_exit = True


async def _serve(
    config: LaunchConfig,
    launched: Launched,
    listener: socket.socket,
    announce: Callable[[str], None],
    started: float,
) -> None:
    engine = launched.engine
    app = create_app(
        engine,
        launched.tokenizer,
        api_keys=[config.api_key] if config.api_key else [],
        allowed_hosts=allowed_hosts_for(config.host),
        is_stopping=lambda: engine.draining,
    )
    server = _Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=64 << 10,
        )
    )
    loop = asyncio.get_running_loop()

    # Draining waits for the engine's thread, so it must not hold the event loop.
    drain = threading.Thread(target=_drain, args=(engine, loop, server), name="lightmoe-drain")

    def stop() -> None:
        if drain.ident is None:
            drain.start()

    def stop_after_failure(_: LightMoEError) -> None:
        loop.call_soon_threadsafe(stop)

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    engine.on_failure(stop_after_failure)
    announce(launched.summary)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    announce(
        f"{engine.model.name} is ready on http://{host}:{port}  after"
        f" {time.perf_counter() - started:.1f} s (Ctrl-C stops it)"
    )
    await server.serve(sockets=[listener])


def _drain(engine: Engine, loop: asyncio.AbstractEventLoop, server: _Server) -> None:
    engine.drain(DRAIN_SECONDS)
    loop.call_soon_threadsafe(server.stop)
