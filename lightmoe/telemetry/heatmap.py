"""Expert load as a picture or a file: what `lightmoe heatmap --url ... -o load.png` makes.

A `LoadTable` comes from the JSON of /v1/experts/load or back from a file; `save` writes it as
.png (to look at), .npz (numpy, no pickle) or .json (as the server sent it).
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightmoe.errors import UsageError

_BAD_FILE = (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)

Placement = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class LoadTable:
    """Expert load since the server's start.

    `expert_tokens` [L, E] and `rank_pairs` [W, L] count (token, expert) pairs; `placement[layer]
    [expert]` lists the ranks that hold the expert, home first; `rank_kinds` says home or spare.
    """

    model: str
    expert_tokens: np.ndarray
    rank_pairs: np.ndarray
    rank_kinds: tuple[str, ...]
    placement: Placement
    epoch: int
    num_steps: int

    @property
    def expert_ratios(self) -> np.ndarray:
        """Tokens relative to their layer's mean, [L, E]; 1 in layers without tokens."""
        return _over_mean(self.expert_tokens)

    @property
    def rank_ratios(self) -> np.ndarray:
        """Pairs relative to their layer's mean over the ranks, [L, W]; 1 where there are none."""
        return _over_mean(self.rank_pairs.T)

    @property
    def rank_is_spare(self) -> np.ndarray:
        """Which ranks hold replicas only, [W]."""
        return np.array([kind == "spare" for kind in self.rank_kinds], dtype=np.bool_)


def _over_mean(counts: np.ndarray) -> np.ndarray:
    means = np.broadcast_to(counts.mean(axis=1, keepdims=True), counts.shape)
    ratios = np.ones(counts.shape)
    np.divide(counts, means, out=ratios, where=means > 0)
    return ratios


def load_table_from_json(document: Mapping[str, object]) -> LoadTable:
    """The table in the JSON of /v1/experts/load, or UsageError saying what it lacks."""
    try:
        table = LoadTable(
            model=str(document["model"]),
            expert_tokens=_counts(document["expert_tokens"]),
            rank_pairs=_counts(document["rank_pairs"]),
            rank_kinds=tuple(str(kind) for kind in _list(document["rank_kinds"])),
            placement=tuple(
                tuple(tuple(_integer(rank) for rank in _list(ranks)) for ranks in _list(layer))
                for layer in _list(document["placement"])
            ),
            epoch=_integer(document["epoch"]),
            num_steps=_integer(document["num_steps"]),
        )
    except KeyError as error:
        raise UsageError(
            f"the expert load has no field {error}; give the JSON of /v1/experts/load"
        ) from None
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"the expert load is malformed ({error}); give the JSON of /v1/experts/load"
        ) from None
    _check(table)
    return table


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]!r} is no list")
    return value


def _counts(value: object) -> np.ndarray:
    return np.array([[_integer(count) for count in _list(row)] for row in _list(value)], np.int64)


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{str(value)[:40]!r} is no integer")
    return value


def _check(table: LoadTable) -> None:
    """Raises UsageError unless the fields speak of the same layers, experts and ranks."""
    tokens, pairs = table.expert_tokens, table.rank_pairs
    num_ranks = len(table.rank_kinds)
    ranks = [rank for layer in table.placement for expert in layer for rank in expert]
    problems = {
        f"expert_tokens has shape {tokens.shape}, not [layers, experts]": tokens.ndim != 2
        or not tokens.size,
        f"rank_pairs has shape {pairs.shape}, not [ranks, layers]": pairs.ndim != 2
        or pairs.shape != (num_ranks, len(tokens)),
        "a count is negative": bool((tokens < 0).any() or (pairs < 0).any()),
        "placement has another number of layers or experts": [len(row) for row in table.placement]
        != [tokens.shape[-1]] * len(tokens),
        f"placement names a rank that is not among {num_ranks}": not all(
            0 <= rank < num_ranks for rank in ranks
        ),
    }
    for problem, is_there in problems.items():
        if is_there:
            raise UsageError(f"the expert load is malformed: {problem}; is it of one server?")


def load_table_to_json(table: LoadTable) -> dict[str, object]:
    """The JSON of /v1/experts/load."""
    num_layers, num_experts = table.expert_tokens.shape
    return {
        "model": table.model,
        "num_layers": num_layers,
        "num_experts": num_experts,
        "num_ranks": len(table.rank_kinds),
        "num_steps": table.num_steps,
        "epoch": table.epoch,
        "expert_tokens": table.expert_tokens.tolist(),
        "rank_pairs": table.rank_pairs.tolist(),
        "rank_kinds": list(table.rank_kinds),
        "placement": [[list(ranks) for ranks in layer] for layer in table.placement],
    }


def save_json(table: LoadTable, path: Path) -> None:
    """Writes the table as the server sends it."""
    path.write_text(json.dumps(load_table_to_json(table)) + "\n", encoding="utf-8")


def save_npz(table: LoadTable, path: Path) -> None:
    """Writes plain arrays: expert_tokens [L, E], rank_pairs [W, L], rank_is_spare [W],
    placement [L, E, most slots of an expert] (ranks, -1 behind the last), model, epoch, num_steps.
    """
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            expert_tokens=table.expert_tokens,
            rank_pairs=table.rank_pairs,
            rank_is_spare=table.rank_is_spare,
            placement=_padded(table.placement),
            model=np.array(table.model),
            epoch=np.array(table.epoch),
            num_steps=np.array(table.num_steps),
        )


def load_npz(path: Path) -> LoadTable:
    """The table that save_npz wrote, or UsageError naming the file. Never unpickles."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            spares = arrays["rank_is_spare"].astype(np.bool_)
            document = {
                "model": str(arrays["model"]),
                "expert_tokens": arrays["expert_tokens"].tolist(),
                "rank_pairs": arrays["rank_pairs"].tolist(),
                "rank_kinds": ["spare" if spare else "home" for spare in spares],
                "placement": _unpadded(arrays["placement"]),
                "epoch": int(arrays["epoch"]),
                "num_steps": int(arrays["num_steps"]),
            }
        return load_table_from_json(document)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except _BAD_FILE as error:
        raise UsageError(
            f"{path} is no expert load ({error}); give a file that `lightmoe heatmap` wrote"
        ) from None


def _padded(placement: Placement) -> np.ndarray:
    most = max((len(ranks) for layer in placement for ranks in layer), default=0)
    rows = [[[*ranks, *[-1] * (most - len(ranks))] for ranks in layer] for layer in placement]
    return np.array(rows, dtype=np.int32).reshape(len(placement), -1, most)


def _unpadded(array: np.ndarray) -> list[list[list[int]]]:
    return [[[rank for rank in ranks if rank >= 0] for ranks in layer] for layer in array.tolist()]


def save_png(table: LoadTable, path: Path) -> None:
    """Draws layer x expert and layer x rank, each cell relative to its layer's mean."""
    try:
        from lightmoe.telemetry.heatmap_figure import draw_load
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{path} needs {error.name}; pip install 'lightmoe[plot]', or write .npz or .json"
        ) from None
    draw_load(table).savefig(path, format="png")


def save(table: LoadTable, path: Path) -> None:
    """Writes the table in the format that the path's suffix names."""
    writers: dict[str, Callable[[LoadTable, Path], None]] = {
        ".png": save_png,
        ".npz": save_npz,
        ".json": save_json,
    }
    writer = writers.get(path.suffix.lower())
    if writer is None:
        known = ", ".join(writers)
        raise UsageError(f"{path} ends in {path.suffix or 'no suffix'}; give one of {known}")
    try:
        writer(table, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
