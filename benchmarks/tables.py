"""Put the newest measurements into the READMEs: the tables between `<!-- name -->` markers.

    python benchmarks/tables.py [--check]

`--check` changes nothing and fails if a README is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "kernels"))
import readme_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
READMES = (
    ROOT / "README.md",
    ROOT / "README.zh-CN.md",
    ROOT / "cute_kernels" / "README.md",
)
GIB = 1 << 30


def main() -> None:
    """Rewrite or check the READMEs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        renewed = renew(text)
        if renewed != text:
            stale.append(path.name)
            if not check:
                path.write_text(renewed, encoding="utf-8")
    print(f"out of date: {', '.join(stale)}" if stale else "up to date")
    sys.exit(1 if check and stale else 0)


def renew(text: str) -> str:
    """The text with every marked table made anew from the results."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def newest(bench: str) -> list[dict[str, Any]]:
    """The newest result of a bench on every machine."""
    by_device: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob(f"{bench}-*.json")):
        result = json.loads(path.read_text())
        if result["bench"] == bench:
            kept = by_device.get(result["device"])
            if kept is None or kept["date"] <= result["date"]:
                by_device[result["device"]] = result
    return list(by_device.values())


def launch_table() -> str:
    """One line per measured machine."""
    lines = [
        "| machine | ranks | ready | memory, all processes | idle: ranks / all | 1 stream"
        " | 32 streams | step dispatch | stop | date, commit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    dispatch = {result["device"]: result["rows"][0] for result in newest("step-dispatch")}
    for result in newest("launch"):
        rows = {row["what"]: row for row in result["rows"] if row["what"] != "throughput"}
        rates = {row["num_streams"]: row for row in result["rows"] if row["what"] == "throughput"}
        idle = rows["idle"]
        step = dispatch.get(result["device"])
        cells = [
            result["device"],
            str(rows["ready"]["num_ranks"]),
            f"{rows['ready']['seconds']:.1f} s",
            f"{rows['memory']['all_bytes'] / GIB:.2f} GiB",
            f"{idle['ranks_core_share']:.1%} / {idle['all_core_share']:.1%} of a core",
            _rate(rates[1]),
            _rate(rates[32]),
            "" if step is None else _spread(step["step_ms"], "ms", 2),
            f"{rows['stop']['seconds']:.1f} s",
            f"{result['date']}, {result['commit']}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rate(row: dict[str, Any]) -> str:
    rate = _spread(row["tokens_per_second"], "tokens/s", 0)
    return f"{rate}, first after {row['first_token_ms']['median']:.0f} ms"


def _spread(figure: dict[str, float], unit: str, digits: int) -> str:
    low, high = figure["min"], figure["max"]
    return f"{figure['median']:.{digits}f} {unit} ({low:.{digits}f}-{high:.{digits}f})"


TABLES = {"launch": launch_table, **readme_tables.TABLES}


if __name__ == "__main__":
    main()
