"""Which transport carries the rows of these ranks, where copy_engine meets, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightmoe.config import LaunchConfig, data_folders, find_data_file
from lightmoe.errors import UsageError
from lightmoe.machine import Driver
from lightmoe.models.config import read_config
from lightmoe.models.find import find_model
from lightmoe.moe.transport_model import ExchangeShape, Way, all_reach, choose_transport
from lightmoe.topology import Topology, read_topology
from lightmoe.topology.find import find_topology
from lightmoe.worker.devices import Devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What carries the rows: "local" for one rank. `reason` is empty where there was no choice."""

    transport: str
    on_host: bool = False
    reason: str = ""


def read_launch_topology(config: LaunchConfig, devices: Devices, driver: Driver) -> Topology | None:
    """The description asked for, or that which was measured of these very cards; None without.

    UsageError where it describes other devices than the ranks have, or too few.
    """
    shared = _share_cards(devices)
    if config.topology == "auto":
        if not devices.cards or shared or config.address is not None:
            return None
        cards = [(driver.gpus[card].name, driver.gpus[card].bus_id) for card in devices.cards]
        return find_topology(data_folders("topology"), cards)
    if shared:
        raise UsageError(
            f"topology {config.topology} has one rank a card and oversubscribe has several;"
            " leave one of the two out"
        )
    found = read_topology(find_data_file("topology", config.topology)).first(config.gpus)
    kinds = {found.device(rank).kind for rank in range(found.num_ranks)}
    if kinds != {devices.device}:
        raise UsageError(
            f"topology {found.name} describes {' and '.join(sorted(kinds))} ranks and these are"
            f" {devices.device} ({devices.reason}); give another --topology, or auto"
        )
    return found


def choose_carrier(
    config: LaunchConfig,
    devices: Devices,
    driver: Driver,
    topology: Topology | None,
    element_bytes: int,
) -> Carried:
    """The transport asked for, or the best by the topology's figures; UsageError if none fits."""
    fitting, what = _fitting(config, devices)
    if config.transport not in ("auto", *fitting):
        raise UsageError(
            f"transport {config.transport} does not fit {what} ({devices.reason});"
            f" take auto or {' or '.join(fitting)}"
        )
    wanted = fitting[0] if config.transport == "auto" else config.transport
    needs_peers = config.payload == "int8" or config.peer_memory != "auto"
    if config.peer_memory != "auto" and wanted != "copy_engine":
        raise UsageError(_no_peer_memory(config, devices, wanted, fitting, what))
    asked = config.transport != "auto" or needs_peers or len(fitting) == 1
    reach = _why_not_on_cards(config, devices, driver, topology)
    if topology is None or asked:
        return _plain(wanted, reach, has_choice=not asked and not _share_cards(devices))
    choice = choose_transport(
        topology,
        _ways(reach),
        _shape(config, element_bytes),
        prefill_tokens=config.max_num_batched_tokens,
        decode_tokens=config.max_num_seqs,
    )
    return Carried(
        transport=choice.way.transport, on_host=choice.way.road == "host", reason=choice.reason
    )


def _no_peer_memory(
    config: LaunchConfig, devices: Devices, transport: str, fitting: Sequence[str], what: str
) -> str:
    """Why there is no memory to meet in, and what to do."""
    remedy = "take transport copy_engine, or leave" if "copy_engine" in fitting else "leave"
    return (
        f"peer_memory {config.peer_memory} says where copy_engine meets, and transport is"
        f" {transport} for {what} ({devices.reason}); {remedy} peer_memory out"
    )


def _fitting(config: LaunchConfig, devices: Devices) -> tuple[tuple[str, ...], str]:
    """The transports that these ranks can have, and the ranks in words."""
    if config.gpus == 1:
        return ("local",), "one rank"
    if devices.device == "cpu":
        return ("gloo",), f"{config.gpus} ranks on the CPU"
    if config.address is not None:
        return ("nccl",), f"{config.gpus} ranks on the GPUs of a cluster"
    if config.expert_slots is not None:
        return ("nccl",), f"{config.gpus} ranks on GPUs that fetch experts from the host"
    if config.overflow != "none":
        waits = f"overflow {config.overflow}, which waits for the host in every layer"
        return ("nccl",), f"{config.gpus} ranks on GPUs with {waits}"
    return ("copy_engine", "nccl"), f"{config.gpus} ranks on GPUs"


def _why_not_on_cards(
    config: LaunchConfig, devices: Devices, driver: Driver, topology: Topology | None
) -> str:
    """Why copy_engine cannot meet on the cards; empty where it can. "device" insists that it can.

    The driver says which cards reach each other, and a topology what copies between them were like.
    """
    if config.peer_memory != "auto":
        return "as asked" if config.peer_memory == "host" else ""
    cards, reach = set(devices.cards), set(driver.p2p_pairs)
    pairs = [(a, b) for a in cards for b in cards if a < b]
    if any((a, b) not in reach and (b, a) not in reach for a, b in pairs):
        return "the driver says that cards do not reach each other"
    if topology is not None and not all_reach(topology):
        return f"by {topology.name} cards do not reach each other"
    return ""


def _share_cards(devices: Devices) -> bool:
    """Whether several ranks have one card: no topology describes that."""
    return len(set(devices.cards)) < len(devices.cards)


def _plain(transport: str, reach: str, *, has_choice: bool) -> Carried:
    """Without figures, or without a choice."""
    if transport != "copy_engine":
        return Carried(transport=transport)
    where = f"over host memory: {reach}" if reach else "over the cards' memory"
    advice = (
        "; to choose by figures: lightmoe topology probe, then --topology" if has_choice else ""
    )
    return Carried(transport=transport, on_host=bool(reach), reason=where + advice)


def _ways(reach: str) -> Sequence[Way]:
    on_host, on_cards, nccl = Way("copy_engine", "host"), Way("copy_engine", "ipc"), Way("nccl")
    return (on_host, nccl) if reach else (on_cards, on_host, nccl)


def _shape(config: LaunchConfig, element_bytes: int) -> ExchangeShape:
    model = read_config(find_model(config.model))
    return ExchangeShape(
        num_experts=model.num_experts,
        num_experts_per_token=model.num_experts_per_tok,
        width=model.hidden_size,
        element_bytes=element_bytes,
    )
