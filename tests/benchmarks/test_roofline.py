"""The roofline: where points lie, what a prediction is made of, and that it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import figures
import moe_layer
import pytest
import results
import roofline
from ceilings import Ceilings
from timing import Timing

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


def a_result(device: str = CARD.device) -> dict[str, Any]:
    """Sixteen rows of a run: two shares of the sm_75 path's own roofs are known beforehand."""
    rows = []
    for dtype, activation, path in (("fp16", "fp16", "sm75"), ("bf16", "bf16", "sm80")):
        for tokens in (1, 64, 1024, 16384):
            for mode in ("free", "deterministic"):
                label = {"shape": "mixtral", "tokens": tokens, "dtype": dtype}
                label |= {"routing": "uniform", "mode": mode, "impl": "lightmoe"}
                work = roofline.work_of(label | {"active_experts": 8.0})
                rate = CARD.instruction["half_k8" if path == "sm75" else "bfloat_k16"]
                ms = 1e3 * max(work.flops / rate, work.num_bytes / 3.0e12) / 0.8
                timing = Timing(ms, ms, ms, 9)
                rows.append(moe_layer.make_row(label, timing, 1e-4, 8.0, activation, path, CARD))
    return {
        "bench": "moe_layer", "device": device, "date": "2026-11-21", "commit": "abc",
        "ceilings": CARD.to_json() | {"device": device}, "rows": rows,
    }  # fmt: skip


def test_points_lie_under_their_roofs() -> None:
    drawn = roofline.roofline_of(a_result(), [])
    assert drawn["bandwidth"] == 3.0e12
    assert len(drawn["points"]) == 8, "free mode only"
    for place in drawn["points"]:
        roof = min(place["intensity"] * drawn["bandwidth"], max(drawn["rates"].values()))
        assert place["rate"] <= roof


def test_prediction_takes_the_share_that_the_measured_card_reached() -> None:
    predicted = roofline.predict([a_result()])
    assert predicted is not None
    assert predicted["predicted"]
    assert "predicted, not measured" in predicted["note"]
    bandwidth = 616e9 * 3.0e12 / 3.352e12
    assert predicted["bandwidth"] == pytest.approx(bandwidth)
    assert len(predicted["points"]) == 4, "only the sm_75 path predicts a Turing card"
    for place in predicted["points"]:
        roof = min(53.8e12, place["intensity"] * bandwidth)
        assert place["rate"] == pytest.approx(0.8 * roof)


def test_a_share_above_one_predicts_no_more_than_the_roof() -> None:
    row = roofline.ours(a_result())[0]
    ms = roofline.predicted_ms(row | {"ms": row["ms"] / 100}, CARD.to_json(), 53.8e12, 550e9)
    work = roofline.work_of(row)
    assert ms == pytest.approx(1e3 * max(work.flops / 53.8e12, work.num_bytes / 550e9))


def test_nothing_is_predicted_without_rows_of_the_turing_path() -> None:
    result = a_result()
    result["rows"] = [row for row in result["rows"] if row["path"] == "sm80"]
    assert roofline.predict([result]) is None
    assert roofline.predict([a_result("some other card")]) is None


def test_pictures_are_drawn_and_measurements_replace_the_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    result = a_result()
    results.write("moe_layer", result["rows"], result["ceilings"], "abc", tmp_path)
    monkeypatch.setattr("sys.argv", ["roofline.py", *_folders(tmp_path)])
    drawn: list[dict[str, Any]] = []
    draw = figures.draw_roofline

    def record(picture: dict[str, Any], folder: Path) -> Path:
        drawn.append(picture)
        return draw(picture, folder)

    monkeypatch.setattr(figures, "draw_roofline", record)
    assert roofline.main() == 0
    assert [picture["predicted"] for picture in drawn] == [False, True]
    predicted = tmp_path / "roofline-rtx-2080-ti.png"
    assert predicted.read_bytes().startswith(b"\x89PNG")
    turing = a_result(roofline.PREDICTED_CARD)
    results.write("moe_layer", turing["rows"], turing["ceilings"], "abc", tmp_path)
    drawn.clear()
    assert roofline.main() == 0
    assert [picture["predicted"] for picture in drawn] == [False, False]
    monkeypatch.setattr("sys.argv", ["figures.py", *_folders(tmp_path)])
    assert figures.main() == 0
    assert (tmp_path / "moe_layer-sm80-bf16-h100.png").stat().st_size > 10_000


def _folders(folder: Path) -> list[str]:
    return ["--results", str(folder), "--out", str(folder)]


def test_bars_are_ours_the_others_and_the_best_published_peer() -> None:
    rows = [row for row in a_result()["rows"] if row["dtype"] == "bf16"]
    rows += [row | {"impl": "torch_grouped_mm"} for row in rows if row["mode"] == "free"]
    series = figures.bar_series(rows, "mixtral", "bf16")
    assert [label for label, _, _ in series] == [
        "Light-MoE",
        "Light-MoE, deterministic",
        "torch_grouped_mm, this run",
        "best peer, other run",
    ]
    assert series[3][2][16384] == pytest.approx(0.81, abs=0.005)
    assert len(figures.bar_series(rows, "mixtral", "int8")) == 3
