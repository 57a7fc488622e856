"""Finds and opens liblight_ops, and turns its status codes into errors.

`make kernels` puts everything into `lib/` beside this file: liblight_ops.so, its Python binding,
the compiled kernels in a folder per architecture, and manifest.json, which lists them.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import operator
import sysconfig
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightmoe.errors import LightMoEError, MachineError, UsageError

FOLDER = Path(__file__).parent / "lib"
ABI = 7
REMEDY = "make kernels"
_BINDING = "_light_ops"
_BAD_ARGUMENT = 4
_REMEDIES = {
    1: "or run the reference kernels: --device cpu",  # the text itself says what to install
    2: "update the NVIDIA driver",
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was built: architecture ("75", "90", "75ptx") -> the names of its kernels."""

    directory: Path
    kernels: dict[str, frozenset[str]]


class Library:
    """liblight_ops, open on one folder of compiled kernels."""

    def __init__(self, binding: Any, manifest: Manifest, architecture: str | None) -> None:
        self.manifest = manifest
        self.architecture = architecture
        self._binding = binding
        self._launches = {stem: _launch_of(binding, stem) for stem in binding.parameters}
        self._architectures: dict[int, str] = {}
        self._bound = _Bound()
        self.reopen()

    def reopen(self) -> None:
        """Make launches use this one's kernels again, after another was open."""
        self._check(self._binding.open(str(self.manifest.directory), self.architecture or ""))

    def architecture_of(self, device: torch.device) -> str:
        """The architecture whose kernels run on a CUDA device; MachineError if none was built."""
        index = _index(device)
        if index not in self._architectures:
            with torch.cuda.device(index):
                if not self._bound.context:
                    self._bind(index)
                answer = self._binding.architecture()
            if isinstance(answer, int):
                self._check(answer)
            self._architectures[index] = str(answer)
        return self._architectures[index]

    def launch(self, stem: str, device: torch.device, **arguments: object) -> None:
        """Enqueue a stem's kernel on the device's current stream.

        The arguments are those of cute_kernels/binding.cpp (pointers by `address`), but the stream.
        """
        here: int = torch._C._cuda_getDevice()
        index = here if device.index is None else device.index
        # As torch's compiler asks for it: torch.cuda.current_stream takes longer than the launch.
        arguments["stream"] = torch._C._cuda_getCurrentRawStream(index)
        enqueue = self._launches[stem]
        if index == here:
            if not self._bound.context:
                self._bind(index)
            status = enqueue(arguments)
        else:
            with torch.cuda.device(index):
                status = enqueue(arguments)
        if status:
            self._check(status)

    def split_needs(
        self,
        tile: tuple[int, ...],
        num_pairs: int,
        num_groups: int,
        num_weight_rows: int,
        depth_splits: int,
    ) -> tuple[int, int]:
        """What a product split along its depth needs at most: int32 tickets, bytes of sums."""
        needs = self._binding.split_needs(
            tile, num_pairs, num_groups, num_weight_rows, depth_splits
        )
        return int(needs[0]), int(needs[1])

    def set_overlapped_launch(self, on: bool) -> None:
        """Whether a kernel may start while the one before it ends (sm_90 and later)."""
        self._binding.set_overlapped_launch(int(on))

    def _bind(self, index: int) -> None:
        """Give this thread a context, as the CUDA runtime does only at a thread's first call."""
        self._check(self._binding.bind_device(index))
        self._bound.context = True

    def _check(self, status: int) -> None:
        if status:
            raise error_of(status, self._binding.last_error())


class _Bound(threading.local):
    """Whether a thread has a context."""

    context = False


def _launch_of(binding: Any, stem: str) -> Callable[[dict[str, object]], int]:
    """A launch of the binding, which takes arguments by position in half the time of names.

    It returns its status. Arguments that have a default may be left out.
    """
    names = binding.parameters[stem]
    function: Callable[..., int] = getattr(binding, stem)
    in_order, num_arguments = operator.itemgetter(*names), len(names)

    def enqueue(arguments: dict[str, object]) -> int:
        if len(arguments) == num_arguments:
            return function(*in_order(arguments))
        return function(**arguments)

    return enqueue


def error_of(status: int, text: str) -> LightMoEError:
    """The error of a status of light_ops.h: UsageError for a bad argument, else MachineError."""
    if status == _BAD_ARGUMENT:
        return UsageError(text)
    remedy = _REMEDIES.get(status)
    return MachineError(f"{text}; {remedy}" if remedy else text)


def address(tensor: Tensor | None) -> int:
    """A tensor's device pointer, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def read_manifest(directory: Path = FOLDER) -> Manifest | None:
    """What is built in `directory`; None where nothing is; MachineError for another version's."""
    path = directory / "manifest.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    if content["abi"] != ABI:
        abi = content["abi"]
        raise MachineError(f"{directory} holds kernels of ABI {abi}, not {ABI}; {REMEDY}")
    names = {
        architecture: frozenset(entry["name"] for entry in entries)
        for architecture, entries in content["architectures"].items()
    }
    return Manifest(directory, names)


def architecture_for(capability: int, built: Iterable[str]) -> str | None:
    """The built architecture that a device of `capability` (75) runs, as liblight_ops chooses it.

    Machine code runs on later devices of its major number; PTX only where it is asked for.
    """
    numbers = [int(name) for name in built if name.isdecimal()]
    fitting = [number for number in numbers if capability // 10 * 10 <= number <= capability]
    return str(max(fitting)) if fitting else None


def open_library(directory: Path = FOLDER, architecture: str | None = None) -> Library:
    """Open the kernels in `directory`; `architecture` overrides the device's own ("75ptx").

    MachineError where they are not built, not for this Python, or where there is no driver.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise MachineError(f"{directory} holds no kernels; build them: {REMEDY}")
    return Library(_load_binding(directory), manifest, architecture)


def library() -> Library:
    """The library that launches use: the one of `using`, else the installed one."""
    if not _opened:
        _opened.append(open_library())
    return _opened[-1]


@contextlib.contextmanager
def using(directory: Path = FOLDER, architecture: str | None = None) -> Iterator[Library]:
    """Let launches inside use other kernels, in all threads: how tests run the PTX of sm_75."""
    chosen = open_library(directory, architecture)
    _opened.append(chosen)
    try:
        yield chosen
    finally:
        _opened.remove(chosen)
        if _opened:
            _opened[-1].reopen()


_opened: list[Library] = []


def _load_binding(directory: Path) -> Any:
    path = directory / f"{_BINDING}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.is_file():
        raise MachineError(f"no {path.name} in {directory} for this Python; build it: {REMEDY}")
    loader = importlib.machinery.ExtensionFileLoader(_BINDING, str(path))
    spec = importlib.util.spec_from_file_location(_BINDING, path, loader=loader)
    assert spec is not None
    binding = importlib.util.module_from_spec(spec)
    loader.exec_module(binding)
    if binding.abi_version() != ABI:
        raise MachineError(f"{path} is of ABI {binding.abi_version()}, not {ABI}: {REMEDY}")
    return binding


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
