"""The generated tables of cute_kernels/README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import readme_tables
import results
import tables

CARD = {"device": "NVIDIA H100 80GB HBM3"}


def layer_row(mode: str, share: float, tokens: int = 4096, path: str = "sm80") -> dict[str, Any]:
    return {
        "shape": "mixtral", "tokens": tokens, "dtype": "bf16", "routing": "uniform", "mode": mode,
        "impl": "lightmoe", "path": path, "ms": 5.0, "share_of_floor": share,
        "share_of_instruction": 0.9, "bound": "compute" if tokens > 999 else "memory",
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    newest = results.newest
    monkeypatch.setattr(results, "newest", lambda bench: newest(bench, tmp_path))
    return tmp_path


def test_layer_table_shows_both_modes_beside_the_best_peer(folder: Path) -> None:
    rows = [layer_row("free", 0.77), layer_row("deterministic", 0.75), layer_row("free", 0.9, 64)]
    results.write("moe_layer", rows, CARD, "abc", folder)
    lines = readme_tables.moe_layer_table().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert [row[4] for row in cells[2:]] == ["64", "4096"]
    assert cells[2][6:] == ["90%", "", "", "96% vLLM Triton, tuned"]
    assert cells[3][6:] == ["77%", "90%", "75%", "76% DeepGEMM"]
    assert len({len(row) for row in cells}) == 1
    assert "measured 2026-11-20 on one H100, other run" in lines[-1]


def test_kernel_shares_are_ranges_by_bound_or_said_to_be_missing(folder: Path) -> None:
    assert readme_tables.kernel_shares("grouped_gemm") == "not measured"
    rows = [
        layer_row("free", share, tokens, path)
        for share, tokens, path in ((0.9, 1, "a"), (0.95, 64, "b"), (0.8, 4096, "c"))
    ]
    results.write("grouped_gemm", rows, CARD, "abc", folder)
    shares = readme_tables.kernel_shares("grouped_gemm")
    assert shares.startswith("memory-bound 90%-95%, compute-bound 80%-80% (NVIDIA H100")
    table = readme_tables.kernels_table()
    assert shares in table
    assert table.count("\n") == 1 + len(readme_tables.KERNELS)


def test_marked_tables_are_made_anew_and_only_they(folder: Path) -> None:
    row = {
        "shape": "mixtral", "tokens": 2048, "dtype": "bf16", "kernel": "naive", "change": "none",
        "ms": 2.0, "tflops": 3.0, "gain": 1.0,
    }  # fmt: skip
    results.write("ladder", [row], CARD, "abc", folder)
    text = "before\n<!-- table ladder -->\nold\n<!-- end -->\nafter\n"
    renewed = tables.renew(text)
    assert renewed.startswith("before\n<!-- table ladder -->\n| step | what changed")
    assert "| naive | none | 2.000 | 3 | 1.00 x |" in renewed
    assert renewed.endswith("<!-- end -->\nafter\n")
    assert "old" not in renewed


def test_every_kernel_of_the_table_has_its_source(checkout: Path) -> None:
    for stem in readme_tables.KERNELS:
        assert (checkout / "cute_kernels" / f"{stem}.cu").is_file()
