"""Result files of the kernel benches: benchmarks/results/<bench>-<machine>-<date>.json.

{bench, device, date, commit, command, ceilings, rows}: like the other benches' files, and what the
card itself reached in the same run.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
MEASURED = ("lightmoe", "cute_kernels", "benchmarks/kernels")
# What makes two rows the same measurement: a later run replaces the earlier one's.
KEY = ("shape", "tokens", "dtype", "routing", "mode", "impl", "path", "kernel")


def machine_name(device: str) -> str:
    """A card's name for file names: "NVIDIA H100 80GB HBM3" is h100."""
    words = re.sub(r"NVIDIA|GeForce|-?\b\d+\s?GB\b|\bHBM\w*", " ", device).split()
    return "-".join(words).lower()


def commit(given: str | None) -> str:
    """The commit that is measured, with + where the tree has changes; `given` where there is none.

    Raises SystemExit in a copy without .git unless the commit is given.
    """
    if given:
        return given
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", *MEASURED) else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        raise SystemExit("no git checkout here; name the commit: --commit HASH") from None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=HERE.parents[1], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def write(
    bench: str,
    rows: Sequence[dict[str, Any]],
    ceilings: dict[str, Any],
    commit_name: str,
    folder: Path = RESULTS,
) -> Path:
    """Write a run's file, or add its rows to the file of this card, day and commit."""
    date = datetime.date.today().isoformat()
    path = folder / f"{bench}-{machine_name(ceilings['device'])}-{date}.json"
    command = " ".join(["python", f"benchmarks/kernels/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    earlier: list[dict[str, Any]] = []
    if path.exists():
        before = json.loads(path.read_text())
        if before["commit"] == commit_name:
            earlier = before["rows"]
            command = "; ".join(dict.fromkeys([before["command"], command]))
    result = {
        "bench": bench,
        "device": ceilings["device"],
        "date": date,
        "commit": commit_name,
        "command": command,
        "ceilings": ceilings,
        "rows": merge(earlier, rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    return path


def merge(
    earlier: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Both, in order, a later row in the place of the earlier one it measures again."""
    merged = {key(row): row for row in earlier}
    merged.update({key(row): row for row in rows})
    return list(merged.values())


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row measured."""
    return tuple(row.get(name) for name in KEY)


def newest(bench: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The newest file of a bench on every card, the newest last."""
    by_device: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{bench}-*.json")):
        result = json.loads(path.read_text())
        if result["bench"] == bench:
            kept = by_device.get(result["device"])
            if kept is None or kept["date"] <= result["date"]:
                by_device[result["device"]] = result
    return sorted(by_device.values(), key=lambda result: result["date"])
