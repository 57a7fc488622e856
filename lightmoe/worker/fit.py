"""What the ranks of a launch hold, by the memory there is: fewer slots than experts if need be."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightmoe.config import LaunchConfig
from lightmoe.errors import MachineError, UsageError
from lightmoe.machine import Driver, free_ram_bytes
from lightmoe.models.config import ModelConfig
from lightmoe.worker.devices import gpu_bytes_per_rank
from lightmoe.worker.resolve import ELEMENT_BYTES, Resolved, resolve
from lightmoe.worker.sizing import Demand, Sizing, size_ranks, slots_that_fit

_USABLE_SHARE = 0.8  # of the free memory: torch, Ray and the operating system want some too
_RANK_OVERHEAD_BYTES = 300 << 20  # a process with torch and Ray in it, measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A launch and what it becomes here.

    `config` is the launch's, with the slots of experts that do not all fit.
    """

    config: LaunchConfig
    resolved: Resolved
    sizing: Sizing


def fit(config: LaunchConfig, model: ModelConfig, driver: Driver) -> Fitted:
    """Resolve and size the ranks, with the slots that fit where GPUs lack room for all experts.

    MachineError with the numbers where nothing fits, or names what keeps experts from the host.
    """
    resolved = resolve(config, driver)
    try:
        sizing = size_ranks(_demand(config, model, resolved, driver))
        fitted = Fitted(config=config, resolved=resolved, sizing=sizing)
    except MachineError as error:
        if resolved.device == "cpu" or config.expert_slots is not None:
            raise
        fitted = _fit_with_host_tier(config, model, driver, error)
    _check_host_memory(fitted)
    return fitted


def _fit_with_host_tier(
    config: LaunchConfig, model: ModelConfig, driver: Driver, error: MachineError
) -> Fitted:
    """With the slots that fit; `error` where they do not help either."""
    if config.host_tier_obstacle is not None:
        flag, _ = config.host_tier_obstacle
        raise MachineError(f"{error}; without {flag} experts could live in the host") from error
    # How many slots there are changes nothing of the rest, that they are counted does.
    tiered = replace(config, expert_slots=1)
    resolved = resolve(tiered, driver)
    demand = _demand(tiered, model, resolved, driver)
    slots = slots_that_fit(demand)
    if slots is None:
        raise error
    return Fitted(
        config=replace(config, expert_slots=slots),
        resolved=resolved,
        sizing=size_ranks(replace(demand, expert_slots=slots)),
    )


def _check_host_memory(fitted: Fitted) -> None:
    """MachineError where this host cannot keep what does not fit its cards."""
    if fitted.resolved.device == "cpu" or fitted.config.address is not None:
        return
    free, wanted = free_ram_bytes(), fitted.sizing.host_bytes
    if free is not None and wanted > free * _USABLE_SHARE:
        raise MachineError(
            f"{wanted / 2**30:.1f} GiB of experts would live in the host's memory, of"
            f" which {free / 2**30:.1f} GiB are free; use a smaller model, or more memory"
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
        element_bytes=ELEMENT_BYTES[resolved.dtype],
        rank_bytes=_rank_bytes(config, resolved, driver) - _exchange_bytes(config, model, resolved),
        max_model_len=config.max_model_len or longest,
        max_num_seqs=config.max_num_seqs,
        on_cpu=resolved.device == "cpu",
        num_free_slots=config.num_free_slots,
        expert_slots=config.expert_slots,
    )


def _exchange_bytes(config: LaunchConfig, model: ModelConfig, resolved: Resolved) -> int:
    """What the transport takes of a rank's card."""
    if resolved.transport != "copy_engine":
        return 0
    # Imported here: without a GPU the driver's process needs no torch.
    from lightmoe.worker.peers import exchange_bytes

    return exchange_bytes(
        model,
        config.gpus,
        config.max_num_batched_tokens,
        ELEMENT_BYTES[resolved.dtype],
        as_int8=resolved.payload == "int8",
    )


def _rank_bytes(config: LaunchConfig, resolved: Resolved, driver: Driver) -> int:
    """What a rank may use for weights and cache: a share of what is free, or the limit if less."""
    if resolved.device == "cuda":
        share = gpu_bytes_per_rank(config, resolved.cards, driver)
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
