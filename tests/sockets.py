"""On which addresses a process listens, as /proc tells."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def listening_addresses(pid: int | None = None) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which a process listens; this one by default."""
    process = Path("/proc") / str(pid or os.getpid())
    inodes = set()
    for entry in (process / "fd").iterdir():
        try:
            inodes.add(os.readlink(entry))
        except OSError:  # closed meanwhile, as the one by which the folder is read
            continue
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for row in (process / "net" / table).read_text().splitlines()[1:]:
            columns = row.split()
            if columns[3] != "0A" or f"socket:[{columns[9]}]" not in inodes:
                continue
            digits, port = columns[1].split(":")
            words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
            found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found
