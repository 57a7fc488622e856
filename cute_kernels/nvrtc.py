"""NVRTC through ctypes: a source and options in, a cubin or PTX out, with what ptxas says of it."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SERIALIZED = "wgmma.mma_async instructions are serialized"
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


class CompileError(Exception):
    """A kernel does not compile; the text is the compiler's log."""


@dataclass(frozen=True)
class Usage:
    """What one kernel takes, as ptxas reports it: registers per thread, bytes per thread or CTA."""

    kernel: str
    registers: int
    spill_bytes: int
    local_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    """The image (ELF, or PTX text) and the usage of its kernels (none for PTX)."""

    image: bytes
    usages: tuple[Usage, ...]


def compile_program(library: Path, source: Path, options: list[str], *, as_ptx: bool) -> Compiled:
    """Compile `source`; raises CompileError with the log."""
    with _own_locale():
        return _compile(ctypes.CDLL(str(library)), source, options, as_ptx=as_ptx)


@contextlib.contextmanager
def _own_locale() -> Iterator[None]:
    """Give the thread its locale back: NVRTC leaves it in that of C, whose text is ASCII."""
    libc = ctypes.CDLL(None)
    libc.uselocale.restype = ctypes.c_void_p
    libc.uselocale.argtypes = [ctypes.c_void_p]
    before = libc.uselocale(None)
    try:
        yield
    finally:
        libc.uselocale(before)


def _compile(nvrtc: ctypes.CDLL, source: Path, options: list[str], *, as_ptx: bool) -> Compiled:
    program = ctypes.c_void_p()
    text, name = source.read_bytes(), source.name.encode()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
    try:
        encoded = [option.encode() for option in options]
        array = (ctypes.c_char_p * len(encoded))(*encoded)
        status = nvrtc.nvrtcCompileProgram(program, len(encoded), array)
        log = _text(nvrtc, program, "nvrtcGetProgramLog").rstrip(b"\0").decode()
        if status != 0:
            raise CompileError(f"{source.name} does not compile ({options[0]}):\n{log}")
        if _SERIALIZED in log:  # right, but several times slower: never what was meant
            raise CompileError(f"{source.name} waits for every wgmma ({options[0]}):\n{log}")
        image = _text(nvrtc, program, "nvrtcGetPTX" if as_ptx else "nvrtcGetCUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return Compiled(image.rstrip(b"\0") if as_ptx else image, parse_usages(log))


def parse_usages(log: str) -> tuple[Usage, ...]:
    """Read the lines of `--ptxas-options=-v`, one kernel after another."""
    usages = []
    parts = _ENTRY.split(log)
    for kernel, part in zip(parts[1::2], parts[2::2], strict=True):
        stack, registers, shared = (rx.search(part) for rx in (_STACK, _REGISTERS, _SHARED))
        if stack is None or registers is None:
            raise CompileError(f"ptxas says nothing of {kernel}'s registers:\n{part}")
        local, stores, loads = map(int, stack.groups())
        usages.append(
            Usage(
                kernel=kernel,
                registers=int(registers[1]),
                spill_bytes=stores + loads,
                local_bytes=local,
                shared_bytes=int(shared[1]) if shared else 0,
            )
        )
    return tuple(usages)


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, getter: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"{getter}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, getter)(program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status != 0:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")
