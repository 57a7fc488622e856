"""Memory and processor time of a process and all that it started, from /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """One process: `pss_bytes` counts shared pages once over all who share them."""

    pid: int
    name: str
    pss_bytes: int
    cpu_seconds: float

    @property
    def is_rank(self) -> bool:
        """Whether this is a rank (Ray names it after its running task) and not Ray itself."""
        return "RankActor" in self.name


def tree(root: int) -> list[Process]:
    """The process and its descendants."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        todo.extend(children.get(pid, []))
        try:
            found.append(_read(pid))
        except OSError:
            continue
    return found


def _read(pid: int) -> Process:
    folder = Path(f"/proc/{pid}")
    name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    rollup = (folder / "smaps_rollup").read_text().splitlines()
    pss = next(int(line.split()[1]) << 10 for line in rollup if line.startswith("Pss:"))
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    return Process(pid, name, pss, (int(fields[11]) + int(fields[12])) / _TICKS)
