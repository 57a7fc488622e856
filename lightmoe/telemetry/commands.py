"""`lightmoe overlap` as a command line. What it runs is imported when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightmoe.errors import UsageError


def overlap(
    report: Path,
    /,
    *,
    step_range: str = "step",
    before: Path | None = None,
    timeline: Path | None = None,
) -> None:
    """Print how much of its communication a recorded run hides, as JSON.

    Parameters
    ----------
    report
        A trace that profile or launch --trace wrote, or an export of nsys (.sqlite).
    step_range
        The NVTX range that is one step, in a report of nsys.
    before
        Another trace of the same work, to draw above this one.
    timeline
        Draw a picture, too: a .png.
    """
    from lightmoe.telemetry.overlap import headline, overlap_of, read_any
    from lightmoe.telemetry.trace_folder import save_timeline

    trace = read_any(report, step_range)
    figures = overlap_of(trace)
    print(json.dumps(figures, indent=2))
    print(headline(figures), file=sys.stderr)
    if timeline is not None:
        save_timeline(timeline, trace, None if before is None else read_any(before, step_range))
    elif before is not None:
        raise UsageError(f"--before {before} is drawn only with --timeline; give a .png")
