"""Rows and result files of the kernel benches: their fields, names and merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import moe_layer
import ncu
import peers
import pytest
import results
import timing
from ceilings import Ceilings
from floors import SHAPES
from timing import Timing

ISSUE_FIELDS = {
    "shape", "tokens", "dtype", "routing", "mode", "impl", "ms", "ms_p10", "ms_p90", "floor_ms",
    "share_of_floor", "error",
}  # fmt: skip
CARD = Ceilings(
    device="NVIDIA H100 80GB HBM3",
    capability=90,
    num_sms=132,
    l2_bytes=50 << 20,
    read=3.0e12,
    copy=2.9e12,
    matmul={"bf16": 800e12, "fp16": 810e12},
    instruction={"half_k8": 480e12, "half_k16": 640e12, "bfloat_k16": 630e12},
)


def a_row(path: str = "sm80", **changes: Any) -> dict[str, Any]:
    label = {
        "shape": "mixtral",
        "tokens": 4096,
        "dtype": "bf16",
        "routing": "uniform",
        "mode": "free",
        "impl": "lightmoe",
    }
    return moe_layer.make_row(
        label | changes, Timing(5.0, 4.9, 5.2, 9), 2e-3, 8, "bf16", path, CARD
    )


def test_a_row_has_the_fields_and_the_shares() -> None:
    row = a_row()
    assert row.keys() >= ISSUE_FIELDS
    flops = 6 * 4096 * 2 * 4096 * 14336
    assert row["floor_ms"] == pytest.approx(1e3 * flops / 800e12)
    assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / 5.0)
    assert row["share_of_instruction"] == pytest.approx(flops / 5e-3 / 630e12)
    assert a_row("sm90")["share_of_instruction"] == pytest.approx(flops / 5e-3 / 800e12)
    assert row["tflops"] == pytest.approx(flops / 5e-3 / 1e12)
    assert row["bound"] == "compute"
    assert row["correct"]
    assert "mixtral" in moe_layer.line(row | {"tile": ""})


def test_a_wrong_row_is_marked_and_nan_is_wrong() -> None:
    label = {"shape": "qwen3", "tokens": 1, "dtype": "bf16", "routing": "uniform"}
    common = (8, "bf16", "sm80", CARD)
    for impl, error, correct in (
        ("lightmoe", 5e-3, False),
        ("lightmoe", float("nan"), False),
        ("torch_grouped_mm", 5e-3, True),
        ("mine:make", 3e-2, False),
    ):
        row = moe_layer.make_row(
            label | {"mode": "free", "impl": impl}, Timing(1, 1, 1, 9), error, *common
        )
        assert row["correct"] is correct


def test_result_file_is_named_by_card_and_day_and_grows(tmp_path: Path) -> None:
    ceilings = CARD.to_json()
    first = results.write("moe_layer", [a_row(), a_row(tokens=1)], ceilings, "abc", tmp_path)
    again = results.write("moe_layer", [a_row() | {"ms": 4.0}], ceilings, "abc", tmp_path)
    assert first == again
    assert first.name.startswith("moe_layer-h100-20")
    result = json.loads(first.read_text())
    assert result.keys() == {
        "bench", "device", "date", "commit", "command", "ceilings", "rows",
    }  # fmt: skip
    assert [(row["tokens"], row["ms"]) for row in result["rows"]] == [(4096, 4.0), (1, 5.0)]
    assert result["ceilings"]["read"] == 3.0e12
    results.write("moe_layer", [a_row()], ceilings, "def", tmp_path)
    assert len(json.loads(first.read_text())["rows"]) == 1, "another commit begins anew"
    assert [r["commit"] for r in results.newest("moe_layer", tmp_path)] == ["def"]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 2080 Ti", "rtx-2080-ti"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4"),
    ],
)
def test_machine_names(device: str, name: str) -> None:
    assert results.machine_name(device) == name


def test_commit_is_taken_from_the_command_line_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: str) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(results, "_git", no_git)
    assert results.commit("abc") == "abc"
    with pytest.raises(SystemExit, match="--commit"):
        results.commit(None)


def test_quantiles_lie_between_neighbours() -> None:
    samples = [5.0, 1.0, 2.0, 3.0, 4.0]
    assert timing.quantile(samples, 0.5) == 3.0
    assert timing.quantile(samples, 0.1) == pytest.approx(1.4)
    assert timing.quantile(samples, 0.9) == pytest.approx(4.6)
    assert timing.quantile([7.0], 0.9) == 7.0


def test_implementations_are_found_by_name_or_by_function() -> None:
    assert moe_layer.find_make("json:loads") is json.loads
    assert moe_layer.find_make("transformers").__module__ == "adapters.transformers_experts"
    assert moe_layer.find_make("vllm_marlin").__module__ == "adapters.vllm_layer"


def test_published_peers_are_shares_of_the_floor() -> None:
    rows = peers.published()["rows"]
    assert {row["shape"] for row in rows} == set(SHAPES)
    assert {row["dtype"] for row in rows} == {"bf16", "int4"}
    assert all(0 < share < 1 for row in rows for share in row["share_of_floor"].values())
    assert peers.best("mixtral", 16384, "bf16") == ("DeepGEMM", pytest.approx(0.81, abs=0.005))
    assert peers.best("qwen3", 64, "int4") == ("vLLM Humming", pytest.approx(0.74, abs=0.005))
    assert peers.best("mixtral", 48, "bf16") is None


NCU_COLUMNS = (
    "ID",
    "Kernel Name",
    ncu.DURATION,
    ncu.DRAM_BYTES,
    ncu.DRAM_SHARE,
    ncu.OCCUPANCY,
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
)
NCU_LINES = (
    NCU_COLUMNS,
    ("", "", "nsecond", "byte", "%", "%", "%"),
    (
        "0",
        "up bf16 T=64/gemm_w64",
        "640,000",
        "1,920,000,000",
        "93.5",
        "24.9",
        "8.1",
    ),
    (
        "1",
        "down bf16 T=4096/gemm_w128",
        "1,900,000",
        "900,000,000",
        "14.2",
        "12.5",
        "88.0",
    ),
    ("2", "route T=64/topk_gate", "4,000", "400,000", "3.0", "40.0", "0"),
)
NCU_LOG = "\n".join(
    ["==PROF== Connected to process 7"]
    + [",".join(f'"{cell}"' for cell in line) for line in NCU_LINES]
)


def test_ncu_log_becomes_rows() -> None:
    listing = "sm__warps_active   Counter  warp\n  sm__pipe_tensor_cycles_active   Counter  cycle\n"
    tensor = ncu.tensor_counter(listing)
    assert tensor == "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
    rows = ncu.read_rows(NCU_LOG, tensor)
    assert [row["kernel"] for row in rows] == [
        "up bf16 T=64",
        "down bf16 T=4096",
        "route T=64",
    ]
    assert [row["bound"] for row in rows] == ["memory", "tensor cores", "latency"]
    assert rows[0]["us"] == pytest.approx(640)
    assert rows[0]["dram_gb_per_second"] == pytest.approx(3000)
    assert rows[1]["tensor_share"] == pytest.approx(0.88)
    assert "| down bf16 T=4096 | 1900.0 | 474 | 14% | 88% | 12% | tensor cores |" in ncu.markdown(
        rows
    )
    with pytest.raises(SystemExit, match="knows none"):
        ncu.tensor_counter("sm__cycles_active")
