"""Real cards for the probe: what NVML says, and what a child process measures with torch.

All NVML and CUDA of the probe is here and in `cuda_child.py`.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import pynvml

from lightmoe.errors import MachineError
from lightmoe.topology.hardware import Card, Copy, Nearness, NvLinks, P2PResult, Speed

START_SECONDS = 90.0
REQUEST_SECONDS = 15.0
STOP_SECONDS = 10.0
_CHILD = (sys.executable, "-m", "lightmoe.topology.cuda_child")
Told = TypeVar("Told")


class ChildHangsError(Exception):
    """The child did not answer in time, and was ended."""


class Child:
    """The process that touches the cards; started at the first request, and again after a hang."""

    def __init__(self, command: Sequence[str] = _CHILD) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)

    def ask(self, request: str, timeout_seconds: float = REQUEST_SECONDS, **values: Any) -> Any:
        """One request's value. ChildHangsError in time, MachineError if it fails or dies."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                bufsize=0,
            )
            timeout_seconds += START_SECONDS
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({"request": request, **values}) + "\n"
        try:
            self._process.stdin.write(line.encode())
        except BrokenPipeError as error:
            raise self._died(request) from error
        if not select.select([self._process.stdout], [], [], timeout_seconds)[0]:
            self.stop()
            raise ChildHangsError(f"{request} took over {timeout_seconds:.0f} s")
        answer = self._process.stdout.readline()
        if not answer:
            raise self._died(request)
        result = json.loads(answer)
        if "error" in result:
            raise MachineError(f"{request} on the cards failed: {result['error']}")
        return result["value"]

    def _died(self, request: str) -> MachineError:
        self.stop()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        return MachineError(
            f"the process that asks the cards died at {request}:"
            f" {lines[-1] if lines else 'no message'}; see `lightmoe doctor`"
        )

    def stop(self) -> None:
        """End the process; the next request starts a new one."""
        if self._process is not None:
            self._process.kill()
            # One that hangs inside the driver ends when the driver lets go of it, if ever.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def close(self) -> None:
        """End the process for good."""
        self.stop()
        self._messages.close()


class NvidiaHardware:
    """This machine's cards, as ranks would see them."""

    def __init__(self, child: Child | None = None, sysfs: Path = Path("/sys")) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise MachineError(f"the NVIDIA driver does not answer: {error}") from error
        self._child = child or Child()
        self._devices = sysfs / "bus/pci/devices"
        self._handles: list[Any] = []
        self._cpus: list[list[int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()
        pynvml.nvmlShutdown()

    def cards(self) -> Sequence[Card]:
        """Ask the child which cards torch sees, and NVML about each."""
        uuids = [uuid.removeprefix("GPU-") for uuid in self._ask("uuids")]
        self._handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        cards = [self._card(handle) for handle in self._handles]
        self._cpus = [self._cpus_near(card.bus_id) for card in cards]
        return cards

    def _card(self, handle: Any) -> Card:
        bus_id = bus_name(pynvml.nvmlDeviceGetPciInfo(handle).busId)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return Card(
            name=pynvml.nvmlDeviceGetName(handle),
            bus_id=bus_id,
            memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            compute_capability=f"{major}.{minor}",
            numa_node=self._numa_node(bus_id),
            lanes=told(lambda: pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle), 0),
            generation=told(lambda: pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle), 0),
            max_lanes=told(lambda: pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle), 0),
            max_generation=told(lambda: pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle), 0),
            nvlinks=_nvlinks(handle),
        )

    def _numa_node(self, bus_id: str) -> int:
        path = self._devices / bus_id / "numa_node"
        return int(path.read_text()) if path.is_file() else -1

    def _cpus_near(self, bus_id: str) -> list[int]:
        path = self._devices / bus_id / "local_cpulist"
        return cpus_of(path.read_text()) if path.is_file() else []

    def nearness(self, first: int, second: int) -> Nearness:
        """NVML's common ancestor of two cards."""
        handles = self._handles[first], self._handles[second]
        level = told(lambda: pynvml.nvmlDeviceGetTopologyCommonAncestor(*handles), None)
        names: dict[int | None, Nearness] = {
            pynvml.NVML_TOPOLOGY_INTERNAL: "board",
            pynvml.NVML_TOPOLOGY_SINGLE: "switch",
            pynvml.NVML_TOPOLOGY_MULTIPLE: "switches",
            pynvml.NVML_TOPOLOGY_HOSTBRIDGE: "host bridge",
            pynvml.NVML_TOPOLOGY_NODE: "socket",
            pynvml.NVML_TOPOLOGY_SYSTEM: "machine",
        }
        return names.get(level, "unknown")

    def test_p2p(self, source: int, target: int) -> P2PResult:
        """In the child: a hang ends it, and is the result."""
        try:
            result: P2PResult = self._child.ask("test_p2p", source=source, target=target)
        except ChildHangsError:
            self._ask("uuids")  # a new one, with the cards started
            return "hangs"
        return result

    def copy_rates(self, copies: Sequence[Copy], seconds: float) -> list[float]:
        """In the child."""
        pairs = [[copy.source, copy.target] for copy in copies]
        timeout = REQUEST_SECONDS + 4 * seconds
        rates: list[float] = self._ask(
            "copy_rates", timeout, copies=pairs, cpus=self._cpus, seconds=seconds
        )
        return rates

    def latency_seconds(self, copy: Copy) -> float:
        """In the child."""
        ends = {"source": copy.source, "target": copy.target}
        return float(self._ask("latency_seconds", REQUEST_SECONDS, **ends, cpus=self._cpus))

    def _ask(self, request: str, timeout: float = REQUEST_SECONDS, **values: Any) -> Any:
        try:
            return self._child.ask(request, timeout, **values)
        except ChildHangsError as error:
            raise MachineError(f"the cards hang: {error}; see `lightmoe doctor`") from error

    def speed(self, card: int) -> Speed:
        """In the child."""
        return Speed(**self._ask("speed", card=card))


def told(call: Callable[[], Told], otherwise: Told) -> Told:
    """What NVML says, or `otherwise` where this driver or card does not tell."""
    try:
        return call()
    except pynvml.NVMLError:
        return otherwise


def bus_name(bus_id: str) -> str:
    """NVML's 00000000:1B:00.0 as Linux writes it: 0000:1b:00.0."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def cpus_of(cpulist: str) -> list[int]:
    """[0, 1, 2, 8] of "0-2,8"."""
    cpus: list[int] = []
    for part in filter(None, cpulist.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def _nvlinks(handle: Any) -> tuple[NvLinks, ...]:
    remotes: Counter[tuple[int, str]] = Counter()
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        if told(lambda link=link: pynvml.nvmlDeviceGetNvLinkState(handle, link), 0):  # type: ignore[misc]
            remotes[_remote(handle, link)] += 1
    return tuple(
        NvLinks(num_links=count, version=version, bus_id=bus_id)
        for (version, bus_id), count in sorted(remotes.items())
    )


def _remote(handle: Any, link: int) -> tuple[int, str]:
    """Version of a link and the bus id of the card at its other end, empty for a switch."""
    version = told(lambda: pynvml.nvmlDeviceGetNvLinkVersion(handle, link), 0)
    kind = told(lambda: pynvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link), None)
    if kind != pynvml.NVML_NVLINK_DEVICE_TYPE_GPU:
        return version, ""
    remote = told(lambda: pynvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId, "")
    return version, bus_name(remote)
