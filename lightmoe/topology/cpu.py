"""Describes a machine without cards: CPU ranks that share its cores, memory and loopback."""

from __future__ import annotations

from dataclasses import dataclass

from lightmoe.topology.parts import Device, Fabric, Link, Node, Rank
from lightmoe.topology.tree import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFigures:
    """What was measured of one machine.

    | field | meaning |
    |---|---|
    | flops_per_second | fp32 matrix products on one core while all cores compute |
    | copy_bytes_per_second | bytes read plus written by one core |
    | message_seconds | cost of a message while all ranks exchange, one after another |
    | loopback_bytes_per_second | bytes of all messages, beside that |
    """

    num_cores: int
    memory_bytes: int
    flops_per_second: float
    copy_bytes_per_second: float
    message_seconds: float
    loopback_bytes_per_second: float


def describe_cpu(figures: CpuFigures, name: str, num_ranks: int) -> Topology:
    """`num_ranks` ranks on one such machine, which share its memory alike."""
    host = Link(
        name="memory",
        kind="memory",
        up_bytes_per_second=figures.copy_bytes_per_second,
        down_bytes_per_second=figures.copy_bytes_per_second,
        latency_seconds=0.0,
        duplex=False,
        origin="measured",
    )
    core = Device(
        name="core",
        kind="cpu",
        memory_bytes=figures.memory_bytes // num_ranks,
        flops_per_second=figures.flops_per_second,
        bytes_per_second=figures.copy_bytes_per_second,
        origin="measured",
    )
    loopback = Fabric(
        name="loopback",
        kind="loopback",
        ranks=tuple(range(num_ranks)),
        shared=True,
        bytes_per_second=figures.loopback_bytes_per_second,
        pair_bytes_per_second=figures.loopback_bytes_per_second,
        latency_seconds=0.0,
        message_seconds=figures.message_seconds,
        origin="measured",
    )
    return Topology(
        name=name,
        description=f"{num_ranks} CPU ranks on {figures.num_cores} cores, gloo over loopback",
        devices={"core": core},
        links={"memory": host},
        nodes={"machine": Node(name="machine", kind="machine", memory="memory")},
        ranks=(Rank(device="core", parent="machine", link="memory"),) * num_ranks,
        fabrics=(loopback,) if num_ranks > 1 else (),
        num_cores=figures.num_cores,
        sources=("lightmoe topology probe",),
    )
