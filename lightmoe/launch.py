"""Wiring: a LaunchConfig becomes ranks, an engine and, for `lightmoe launch`, a server.

What `auto` became is said in one line, with its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from lightmoe.balancer.loop import Balancer
from lightmoe.balancer.recorder import TraceRecorder
from lightmoe.balancer.start import start_balancer
from lightmoe.collector import settle_objects
from lightmoe.config import LaunchConfig, parse_skew
from lightmoe.core import HostTierCounts, ModelInfo, OverflowRule
from lightmoe.engine.engine import Engine, SchedulerConfig
from lightmoe.errors import CheckpointError, LightMoEError, MachineError
from lightmoe.machine import port_holder, read_driver
from lightmoe.models.checkpoint import check_tensors, read_index
from lightmoe.models.config import ModelConfig, read_config
from lightmoe.models.find import find_model, generation_defaults
from lightmoe.server.app import allowed_hosts_for, create_app
from lightmoe.server.tokenizer import Tokenizer
from lightmoe.telemetry.rank_recorder import TraceConfig
from lightmoe.telemetry.trace_folder import finish_folder, prepare_folder
from lightmoe.topology import Topology
from lightmoe.worker.config import WorkerConfig
from lightmoe.worker.fit import fit
from lightmoe.worker.ray_cluster import RayConfig
from lightmoe.worker.ray_group import Progress, RayWorkerGroup
from lightmoe.worker.resolve import Resolved, kernels_for
from lightmoe.worker.sizing import Sizing

DRAIN_SECONDS = 1.5
"""Running requests get this long after Ctrl-C; then they end with an error event."""

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Ranks with their weights loaded, what they serve, and the line that says what was chosen.

    `config` is the launch's, with the slots of experts that do not all fit.
    """

    group: RayWorkerGroup
    model: ModelInfo
    tokenizer: Tokenizer | None
    summary: str
    config: LaunchConfig
    topology: Topology | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A running engine and what its front needs."""

    engine: Engine
    tokenizer: Tokenizer | None
    summary: str


def start_engine(config: LaunchConfig, progress: Progress) -> Launched:
    """Start the ranks, and an engine over them."""
    recorder = _new_recorder(config)
    try:
        started = start_workers(config, progress, _trace_config(config))
    except BaseException:
        if recorder is not None:
            recorder.close()
        raise
    limits = SchedulerConfig(
        max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
    )
    engine = Engine(
        started.model,
        started.group,
        limits,
        route=config.route,
        balancer=_start_balancer(started.config, started.group, started.topology),
        recorder=recorder,
    )
    engine.start()
    return Launched(engine=engine, tokenizer=started.tokenizer, summary=started.summary)


def _trace_config(config: LaunchConfig) -> TraceConfig | None:
    return None if config.trace is None else TraceConfig(folder=prepare_folder(Path(config.trace)))


def _start_balancer(
    config: LaunchConfig, group: RayWorkerGroup, topology: Topology | None
) -> Balancer | None:
    if not config.rebalances:
        return None
    return start_balancer(
        group.ranks,
        group.placement,
        interval_steps=config.rebalance_interval,
        bytes_per_step=config.migration_bytes_per_step,
        num_free_slots=config.num_free_slots,
        from_host=config.host_copy == "on",
        topology=topology,
    )


def _new_recorder(config: LaunchConfig) -> TraceRecorder | None:
    """Before any rank starts, so that a path that cannot be written is refused at once."""
    if config.record_routing is None:
        return None
    model = read_config(find_model(config.model))
    return TraceRecorder(
        Path(config.record_routing),
        len(model.moe_layers),
        model.num_experts,
        model.num_experts_per_tok,
    )


def start_workers(
    config: LaunchConfig, progress: Progress, trace: TraceConfig | None = None
) -> Started:
    """Find the model, size the ranks, start them and load; `trace` says which steps to record."""
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
    fitted = fit(config, model, driver)
    config, resolved, sizing = fitted.config, fitted.resolved, fitted.sizing
    kernels = kernels_for(resolved, driver)
    workers = RayWorkerGroup(
        WorkerConfig(
            model=model,
            folder=folder,
            load_format=config.load_format,
            placement=sizing.placement,
            route=config.route,
            device=resolved.device,
            cards=() if config.address else resolved.cards,
            transport=resolved.transport,
            overlap=config.overlap,
            peers_on_host=resolved.peers_on_host,
            payload=resolved.payload,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            dtype=resolved.dtype,
            max_model_len=sizing.max_model_len,
            num_kv_blocks=sizing.num_kv_blocks,
            num_threads=1,
            seed=config.seed,
            deterministic=config.deterministic == "on",
            num_free_slots=config.num_free_slots,
            expert_slots=config.expert_slots,
            host_copy=config.host_copy == "on",
            max_recorded_tokens=config.max_num_batched_tokens if config.record_routing else 0,
            routing_skew=None if config.routing_skew is None else parse_skew(config.routing_skew),
            overflow=_overflow_rule(config),
            trace=trace,
            nearness=() if resolved.topology is None else resolved.topology.nearness(),
        ),
        RayConfig(
            address=config.address,
            # Ray here is ours alone, and has nothing to share out: ranks take the cards in order.
            gpus_per_rank=int(resolved.device == "cuda" and config.address is not None),
        ),
        progress,
    )
    return Started(
        group=workers,
        model=_model_info(config, folder, model, sizing),
        tokenizer=tokenizer,
        summary=_summary(config, resolved, kernels, sizing, workers.ranks[0].overlap),
        config=config,
        topology=resolved.topology,
    )


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
        routing_skew=config.routing_skew,
        overflow=_overflow_rule(config),
    )


def _overflow_rule(config: LaunchConfig) -> OverflowRule | None:
    if config.overflow == "none":
        return None
    return OverflowRule(config.overflow, float(config.capacity_factor))


def _overflow_text(config: LaunchConfig, resolved: Resolved) -> str:
    """What is lossy about it, and what it costs."""
    rule = _overflow_rule(config)
    if rule is None:
        return ""
    if config.gpus == 1:
        return f"; overflow {rule}: never on one rank"
    waits = " (the host decides in every layer: no CUDA graphs)"
    return f"; OVERFLOW CHANGES TOKENS: {rule}" + (waits if resolved.device == "cuda" else "")


def _summary(
    config: LaunchConfig, resolved: Resolved, kernels: str, sizing: Sizing, overlap: str
) -> str:
    kinds = f"{config.num_homes} homes + {config.num_spares} spares"
    ranks = f"{config.gpus} ranks, all alike" if config.placement == "spread" else kinds
    slots = [sizing.placement.num_slots(rank) for rank in range(config.gpus)]
    held = "-".join(str(number) for number in sorted({min(slots), max(slots)}))
    return (
        f"{resolved.device} ({resolved.reason}), {resolved.dtype}, transport {resolved.transport}"
        + (f" ({resolved.carrier})" if resolved.carrier else "")
        + f", route {config.route}, placement {config.placement}: {ranks},"
        f" {held} experts a rank; context {sizing.max_model_len},"
        f" KV cache {sizing.cache_bytes / 2**20:.0f} MiB a rank; kernels: {kernels},"
        f" deterministic {config.deterministic}"
        + (", payload int8" if resolved.payload == "int8" else "")
        + (f"; {overlap}" if overlap else "")
        + _host_tier_text(sizing)
        + _overflow_text(config, resolved)
        + (f"; ROUTING IS MADE UP: {config.routing_skew}" if config.routing_skew else "")
    )


def _host_tier_text(sizing: Sizing) -> str:
    if not sizing.host_bytes:
        return ""
    held = [sizing.placement.num_slots(rank) for rank in range(sizing.placement.num_ranks)]
    beyond = sum(max(0, count - sizing.num_slots) for count in held)
    return (
        f"; host tier: {sizing.num_slots} slots a rank, {beyond} of {sum(held)} experts live in the"
        f" host beyond them ({sizing.host_bytes / 2**30:.2f} GiB with those in slots); no replicas,"
        " no migration, no CUDA graphs"
    )


def host_tier_line(counts: HostTierCounts) -> str:
    """What the host tier did, for the console."""
    return (
        f"host tier: {counts.hit_rate:.1%} of {counts.num_hits + counts.num_misses} experts were in"
        f" their slots when needed ({counts.num_prefetched} fetched ahead);"
        f" {counts.fetched_bytes / 2**30:.2f} GiB fetched, ranks waited"
        f" {counts.waited_seconds:.2f} s in all"
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
        _balancer_lines(announce),
    ):
        launched = start_engine(config, progress)
        settle_objects()
        try:
            asyncio.run(_serve(config, launched, listener, announce, started))
        finally:
            launched.engine.close()
        counts = launched.engine.stats().host_tier
        if counts is not None:
            announce(host_tier_line(counts))
        if launched.engine.failure is not None:
            raise launched.engine.failure
        if config.trace is not None:
            title = f"{launched.engine.model.name}, {config.gpus} ranks"
            for line in finish_folder(Path(config.trace).resolve(), config.gpus, title):
                announce(line)


class _Lines(logging.Handler):
    """Log records as lines for the console."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._announce = announce

    def emit(self, record: logging.LogRecord) -> None:
        """One record, one line."""
        self._announce(record.getMessage())


@contextlib.contextmanager
def _balancer_lines(announce: Callable[[str], None]) -> Iterator[None]:
    """What the balancer logs is said on the console: two lines a migration."""
    logger, handler = logging.getLogger("lightmoe.balancer"), _Lines(announce)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


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
