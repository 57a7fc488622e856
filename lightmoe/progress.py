"""How far a start is, as bars on the console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from lightmoe.worker.ray_group import Progress


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """One bar per stage: ranks that have started, ranks that have loaded."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    labels = {"start": "starting ranks", "load": "loading weights"}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bars = Bars(*columns, console=console)
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            bars.start()
            tasks[stage] = bars.add_task(labels[stage], total=total)
        bars.update(tasks[stage], completed=done)
        if stage == "load" and done == total:
            bars.stop()

    try:
        yield report
    finally:
        bars.stop()
