"""What a bench leaves behind: the JSON of a run, its table, and where and on what it ran."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightmoe.bench.measure import Row
from lightmoe.bench.straggler import Straggler
from lightmoe.errors import MachineError, UsageError
from lightmoe.machine import read_driver

_CHECKOUT = Path(__file__).resolve().parents[2]


def device_name() -> str:
    """The processor, the cores this process may use, and the GPUs."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    processor = model[1] if model else platform.machine()
    names = [gpu.name for gpu in read_driver().gpus]
    gpus = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return "; ".join([*gpus, f"{processor}, {len(os.sched_getaffinity(0))} cores"])


def commit(checkout: Path = _CHECKOUT) -> str | None:
    """The commit that runs, with + where the package has changes; None outside a checkout."""
    if not (checkout / ".git").exists():
        return None
    try:
        head = _git(checkout, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(checkout, "status", "--porcelain", "--", "lightmoe") else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # no git here, or a checkout that it does not trust


def _git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@dataclass(kw_only=True)
class Report:
    """One run of the bench; `rows` grow while it runs."""

    command: str
    config: dict[str, Any]
    model: str = ""
    device: str = field(default_factory=device_name)
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    commit: str | None = field(default_factory=commit)
    rows: list[Row] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write everything so far as JSON."""
        document = {"bench": "bench"} | {name: getattr(self, name) for name in _ORDER}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """One line a row, to be read on a terminal."""
        table = Table(title=f"{self.model} on {self.device}", title_justify="left", box=SIMPLE_HEAD)
        for name in ("routing", "batch", "prompt", *_FIGURES):
            is_last = name == _FIGURES[-1]
            table.add_column(
                name, justify="left" if name == "routing" else "right", no_wrap=is_last
            )
        for row in self.rows:
            table.add_row(*_cells(row))
        return table


_ORDER = ("model", "device", "date", "commit", "command", "config", "rows")
_FIGURES = (
    "prefill\ntokens/s",
    "decode\ntokens/s",
    "first token, ms\np50 / p95 / p99",
    "between tokens, ms\np50 / p95 / p99",
    "straggler, times mean\nrank, layer (expert)",
)


def _cells(row: Row) -> list[str]:
    straggler = row["straggler"]
    return [
        row["routing"],
        str(row["batch_size"]),
        str(row["prompt_length"]),
        _rate(row["prefill_tokens_per_second"]),
        _rate(row["decode_tokens_per_second"]),
        _delays(row["ttft_ms"]),
        _delays(row["inter_token_ms"]),
        "nobody" if straggler is None else str(Straggler(**straggler)),
    ]


def _rate(samples: dict[str, float] | None) -> str:
    if samples is None:
        return "not all at once"
    return f"{samples['median']:,.0f}\n{samples['min']:,.0f}-{samples['max']:,.0f}"


def _delays(values: dict[str, float]) -> str:
    return " / ".join(_milliseconds(values[name]) for name in ("p50", "p95", "p99"))


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def new_folder(path: Path) -> Path:
    """The folder for the results, made if need be, before anything takes time."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"{path} is no folder; give another -o") from None
    except OSError as error:
        raise MachineError(f"{path} cannot be made ({error.strerror}); give another -o") from error
    return path


def waited(rows: Sequence[Row]) -> list[str]:
    """What a reader of the rows must know, in words; one line a row that needs one."""
    lines = []
    for row in rows:
        where = f"{row['routing']}, batch {row['batch_size']}, prompt {row['prompt_length']}"
        if row["decode_tokens_per_second"] is None:
            lines.append(
                f"{where}: never decoded all at once; launch with more --max-num-seqs or"
                " --max-num-batched-tokens, or give a longer --output-length"
            )
        if row["num_preemptions"]:
            lines.append(
                f"{where}: {row['num_preemptions']} preemptions, the KV cache was full;"
                " give ranks more memory, or a smaller batch"
            )
    return lines
