"""Recorded routing: which experts each token chose, in which step, from which rank.

A trace is one .npz that anyone can read and write with numpy alone:

    experts       uint16 [num_tokens, num_layers, K]   distinct within a token, best first or not
    step_ids      int32 [num_tokens]
    source_ranks  int16 [num_tokens]
    num_experts   integer

Layers are those that have experts. Nothing in the file is unpickled.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from lightmoe.errors import TraceError

MAX_EXPERTS = 1 << 16
"""What uint16 can number."""

_ARRAYS: dict[str, tuple[type[np.integer[Any]], int]] = {
    "experts": (np.uint16, 3),
    "step_ids": (np.int32, 1),
    "source_ranks": (np.int16, 1),
}
_BAD_FILE = (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
_COPIED_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """experts uint16 [T, L, K], step_ids int32 [T], source_ranks int16 [T]; T tokens in all.

    Raises TraceError where shapes, types or values cannot be a routing.
    """

    experts: np.ndarray
    step_ids: np.ndarray
    source_ranks: np.ndarray
    num_experts: int

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_values()

    def _check_shapes(self) -> None:
        for name, (dtype, num_axes) in _ARRAYS.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != num_axes:
                raise TraceError(
                    f"{name} is {array.dtype} with {array.ndim} axes;"
                    f" give {np.dtype(dtype)} with {num_axes}"
                )
            if len(array) != len(self.experts):
                raise TraceError(
                    f"{name} has {len(array)} tokens, experts {len(self.experts)}; give as many"
                )
        if not self.experts.size:
            raise TraceError(f"experts has shape {self.experts.shape}; record at least one token")

    def _check_values(self) -> None:
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise TraceError(f"num_experts is {self.num_experts}; give 1 to {MAX_EXPERTS}")
        if (most := int(self.experts.max())) >= self.num_experts:
            raise TraceError(f"expert {most} is chosen of {self.num_experts}; number them from 0")
        for name in ("step_ids", "source_ranks"):
            if (least := int(getattr(self, name).min())) < 0:
                raise TraceError(f"{name} has {least}; number them from 0")
        chosen = np.sort(self.experts, axis=2)
        if (chosen[:, :, 1:] == chosen[:, :, :-1]).any():
            raise TraceError("a token chose one expert twice; its experts must be distinct")

    @property
    def num_layers(self) -> int:
        """Layers that have experts."""
        return int(self.experts.shape[1])

    @property
    def num_steps(self) -> int:
        """Steps that have tokens."""
        return len(self._steps[0]) - 1

    @cached_property
    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each step begins in the order of steps, and that order of the tokens."""
        order = np.argsort(self.step_ids, kind="stable")
        begins = np.flatnonzero(np.diff(self.step_ids[order], prepend=-1))
        return np.append(begins, len(order)), order

    def counts(self, begin: int, end: int) -> np.ndarray:
        """Tokens per expert of the steps begin .. end, the first being 0: int64 [steps, L, E]."""
        begins, order = self._steps
        steps = np.repeat(np.arange(end - begin), np.diff(begins[begin : end + 1]))
        experts = self.experts[order[begins[begin] : begins[end]]].astype(np.int64)
        layers = np.arange(self.num_layers)[:, None]
        cells = (steps[:, None, None] * self.num_layers + layers) * self.num_experts + experts
        size = (end - begin) * self.num_layers * self.num_experts
        counts = np.bincount(cells.ravel(), minlength=size)
        return counts.reshape(end - begin, self.num_layers, self.num_experts)


def read_trace(path: Path) -> RoutingTrace:
    """The trace in a .npz, or TraceError naming the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("not a zip archive")
            file.seek(0)
            return _read(file)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or error}") from None
    except _BAD_FILE as error:
        raise TraceError(
            f"{path} is no routing trace ({error}); give an .npz that --record-routing wrote"
        ) from None


def _read(file: IO[bytes]) -> RoutingTrace:
    with np.load(file, allow_pickle=False) as arrays:
        number = arrays["num_experts"]
        if number.size != 1 or not np.issubdtype(number.dtype, np.integer):
            raise TraceError(f"num_experts is {number.dtype} {number.shape}; give one integer")
        return RoutingTrace(
            arrays["experts"], arrays["step_ids"], arrays["source_ranks"], int(number.item())
        )


def write_trace(trace: RoutingTrace, path: Path) -> None:
    """Write the .npz; TraceError where the file cannot be."""
    with TraceWriter(
        path, trace.num_layers, trace.num_experts, int(trace.experts.shape[2])
    ) as writer:
        writer.add(trace.step_ids, trace.experts, trace.source_ranks)


class TraceWriter:
    """Writes a trace step by step: tokens lie in unnamed files until `close` makes the .npz.

    However long the run, memory holds one step. Without `close` there is no trace.
    """

    def __init__(self, path: Path, num_layers: int, num_experts: int, num_per_token: int) -> None:
        self._path = path
        self._token_shape = (num_layers, num_per_token)
        self._num_experts = num_experts
        self._num_tokens = 0
        try:
            self._files: dict[str, IO[bytes]] = {
                name: tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115
                for name in _ARRAYS
            }
        except OSError as error:
            raise self._cannot(error) from None

    def add(
        self, step_ids: np.ndarray | int, experts: np.ndarray, source_ranks: np.ndarray
    ) -> None:
        """Append tokens: experts [T, L, K], their step or step_ids [T], source_ranks [T].

        Raises TraceError where they are no routing of this model.
        """
        if experts.shape[1:] != self._token_shape:
            raise TraceError(
                f"experts has shape {experts.shape}; give [tokens, {self._token_shape[0]},"
                f" {self._token_shape[1]}]"
            )
        if not len(experts):
            return
        steps = np.broadcast_to(np.asarray(step_ids), len(experts))
        if int(experts.min()) < 0 or int(experts.max()) >= self._num_experts:
            raise TraceError(
                f"experts {experts.min()} to {experts.max()} are chosen of {self._num_experts};"
                " number them from 0"
            )
        for name, numbers in (("step_ids", steps), ("source_ranks", source_ranks)):
            if int(numbers.max()) > np.iinfo(_ARRAYS[name][0]).max:
                raise TraceError(
                    f"{name} has {numbers.max()}, too large for {_ARRAYS[name][0].__name__}"
                )
        trace = RoutingTrace(
            np.ascontiguousarray(experts, dtype=np.uint16),
            np.ascontiguousarray(steps, dtype=np.int32),
            np.ascontiguousarray(source_ranks, dtype=np.int16),
            self._num_experts,
        )
        try:
            for name, file in self._files.items():
                file.write(memoryview(getattr(trace, name)).cast("B"))
        except OSError as error:
            raise self._cannot(error) from None
        self._num_tokens += len(experts)

    def close(self) -> None:
        """Make the .npz, at once: a reader sees the whole of it or the file that was there."""
        part = self._path.with_name(self._path.name + ".part")
        try:
            with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, (dtype, _) in _ARRAYS.items():
                    self._store(archive, name, np.dtype(dtype))
                with archive.open("num_experts.npy", "w") as member:
                    np.lib.format.write_array(member, np.array(self._num_experts))
            os.replace(part, self._path)
        except OSError as error:
            raise self._cannot(error) from None
        finally:
            self.discard()

    def _store(self, archive: zipfile.ZipFile, name: str, dtype: np.dtype[np.generic]) -> None:
        shape = (self._num_tokens, *self._token_shape) if name == "experts" else (self._num_tokens,)
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        }
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            self._files[name].seek(0)
            shutil.copyfileobj(self._files[name], member, _COPIED_BYTES)

    def discard(self) -> None:
        """Forget what was added; nothing appears under the path."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close after a run that ended well, else discard."""
        if kind is None:
            self.close()
        else:
            self.discard()

    def _cannot(self, error: OSError) -> TraceError:
        return TraceError(f"{self._path} cannot be written: {error.strerror or error}")
