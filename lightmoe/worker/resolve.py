"""What every `auto` of a launch becomes on this machine: device, dtype, transport, kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightmoe.config import LaunchConfig
from lightmoe.errors import UsageError
from lightmoe.machine import Driver
from lightmoe.topology import Topology
from lightmoe.worker.config import Payload
from lightmoe.worker.devices import choose_devices
from lightmoe.worker.transports import choose_carrier, read_launch_topology

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What `auto` became, and the sentence that says why; on GPUs the card of each rank.

    `carrier` says why rows travel by this transport. `topology` is None where nobody measured.
    """

    device: str
    dtype: str
    transport: str
    reason: str
    cards: tuple[int, ...] = ()
    payload: Payload = "full"
    carrier: str = ""
    peers_on_host: bool = False
    topology: Topology | None = None


def resolve(config: LaunchConfig, driver: Driver) -> Resolved:
    """Device, dtype, transport, payload; UsageError or MachineError where a wish cannot be met."""
    devices = choose_devices(config, driver)
    turing = any(driver.gpus[card].compute_capability < (8, 0) for card in devices.cards)
    dtype: str = config.dtype
    if dtype == "auto":
        halves = "float16" if turing else "bfloat16"
        dtype = "float32" if devices.device == "cpu" else halves
    if dtype == "bfloat16" and turing:
        raise UsageError(f"{driver.gpus[0].name} has no bfloat16; use --dtype float16")
    topology = read_launch_topology(config, devices, driver)
    carried = choose_carrier(config, devices, driver, topology, ELEMENT_BYTES[dtype])
    resolved = Resolved(
        device=devices.device,
        dtype=dtype,
        transport=carried.transport,
        reason=devices.reason,
        cards=devices.cards,
        carrier=carried.reason,
        peers_on_host=carried.on_host,
        topology=topology,
    )
    return replace(resolved, payload=_payload(config, resolved))


def kernels_for(resolved: Resolved, driver: Driver) -> str:
    """The kernels that device and dtype lead to, and why; MachineError where they are missing."""
    if resolved.device == "cpu":
        return "reference (the CPU)"
    # Imported here: without a GPU the driver's process needs no torch.
    from lightmoe.kernels.choice import choose_kernels

    return choose_kernels(resolved.dtype, driver.gpus[0].compute_capability)


def _payload(config: LaunchConfig, resolved: Resolved) -> Payload:
    """How rows travel; UsageError where nothing carries int8."""
    fits = resolved.transport == "copy_engine" and resolved.dtype != "float32"
    if config.payload == "int8" and not fits:
        raise UsageError(
            f"payload int8 is for 16 bits and transport copy_engine, and here is {resolved.dtype}"
            f" and {resolved.transport}; take payload full"
        )
    return config.payload
