"""A safetensors checkpoint seen from outside: which file holds which tensor, of what shape.

Only headers are read here, with bounds, before anything is started. Pickle files are refused.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from lightmoe.errors import CheckpointError
from lightmoe.models.config import ModelConfig, read_json

_MAX_HEADER_BYTES = 256 << 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """`files[name]` is the file that holds a tensor; `shapes[name]` its shape."""

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]


def read_index(folder: Path) -> CheckpointIndex:
    """Headers of all shards; CheckpointError names what is missing, truncated or refused."""
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _shards(folder):
        for name, shape in _read_header(path).items():
            files[name], shapes[name] = path, shape
    return CheckpointIndex(files, shapes)


def check_tensors(index: CheckpointIndex, config: ModelConfig) -> None:
    """Every tensor of the model is there, with its shape."""
    for name, shape in config.all_tensors():
        if name not in index.shapes:
            raise CheckpointError(
                f"tensor {name} is missing from the checkpoint; fetch the complete model"
            )
        if index.shapes[name] != shape:
            raise CheckpointError(
                f"tensor {name} in {index.files[name]} has shape {list(index.shapes[name])},"
                f" config.json says {list(shape)}; config and weights belong to different models"
            )


def _shards(folder: Path) -> list[Path]:
    index_path = folder / "model.safetensors.index.json"
    if index_path.exists():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path} has no weight_map; fetch the complete model")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if name != os.path.basename(name) or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index_path} names {name!r}; only .safetensors files beside it are read"
                )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"shard {folder / missing[0]} is missing ({len(missing)} of {len(names)} are);"
                " fetch the complete model"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickled:
        raise CheckpointError(
            f"{folder} has only pickle weights ({pickled[0]}), which can run code;"
            " convert them to safetensors"
        )
    raise CheckpointError(
        f"{folder} has no weights (model.safetensors); fetch them, or try --load-format dummy"
    )


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise CheckpointError(f"{path} has {size} bytes and no header; fetch it again")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path} has {size} bytes but a header of {header_bytes}; fetch it again"
            )
        try:
            header = json.loads(file.read(header_bytes))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            expected = 8 + header_bytes + end
            shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
            dtypes = {name: entry["dtype"] for name, entry in entries.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} has a broken header ({error}); fetch it again"
            ) from error
    if size != expected:
        raise CheckpointError(
            f"{path} has {size} bytes, its header says {expected}; fetch it again"
        )
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"tensor {name} in {path} is {dtype}; {', '.join(_DTYPES)} are read"
            )
    return shapes
