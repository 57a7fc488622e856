"""Measures this machine and writes its topology file: `lightmoe topology probe`."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lightmoe.errors import MachineError, UsageError
from lightmoe.machine import free_ram_bytes, read_driver
from lightmoe.topology import Topology, read_topology, to_toml

Say = Callable[[str], None]


def probe_machine(
    output: Path, num_ranks: int, device: Literal["auto", "cuda", "cpu"], say: Say
) -> None:
    """Measure and write; the file is read back as a check. `num_ranks` are CPU ranks."""
    if not output.resolve().parent.is_dir():
        raise UsageError(f"there is no folder {output.resolve().parent} to write {output.name} to")
    driver = read_driver()
    if device == "cuda" or (device == "auto" and (driver.gpus or driver.error)):
        if driver.error:
            raise MachineError(
                f"the NVIDIA driver does not answer ({driver.error}); see `lightmoe doctor`, or"
                " describe the CPU: --device cpu"
            )
        topology = _probe_cards(output.stem, say)
    else:
        topology = _probe_cpu(output.stem, num_ranks, say)
    today = datetime.date.today().isoformat()
    comments = [f"Measured by `lightmoe topology probe` on {today}; edit what you know better."]
    output.write_text(to_toml(topology, comments), encoding="utf-8")
    read_topology(output)
    say(f"wrote {output}")


def _probe_cards(name: str, say: Say) -> Topology:
    from lightmoe.topology.nvidia import NvidiaHardware
    from lightmoe.topology.probe import probe

    with NvidiaHardware() as hardware:
        return probe(hardware, name, say)


def _probe_cpu(name: str, num_ranks: int, say: Say) -> Topology:
    from lightmoe.distributed.loopback import measure_cpu
    from lightmoe.topology.cpu import describe_cpu

    if not 1 <= num_ranks <= 64:
        raise UsageError(f"gpus is {num_ranks}; give 1 to 64 ranks on one CPU")
    free = free_ram_bytes()
    if free is None:
        raise MachineError("this system does not tell its free memory; describe it by hand")
    say(f"no GPU: {num_ranks} ranks on the CPU")
    return describe_cpu(measure_cpu(num_ranks, free), name, num_ranks)
