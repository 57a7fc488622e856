"""`lightmoe plan`, `simulate` and `topology` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightmoe.cli import main
from lightmoe.distributed import loopback
from lightmoe.machine import Driver
from lightmoe.plan import probing
from lightmoe.topology import read_topology

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--model", "mixtral-8x7b", "--topology", "10x2080ti-pcie", "--gpus", "10")
    assert run("plan", *asked, "--quantization", "int4", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert [entry["num_homes"] for entry in figures["memory"]] == [32] * 8 + [0, 0]
    assert run("plan", *asked) == 0
    assert "nothing fits" in capsys.readouterr().out


def test_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--topology", "8xh200-nvlink", "--gpus", "8", "--model", "qwen3-30b-a3b")
    assert run("simulate", *asked, "--tokens-per-rank", "256", "--routing-skew", "zipf:1.0") == 0
    assert "step" in capsys.readouterr().out
    assert run("simulate", *asked, "--tokens-per-rank", "256", "--chunks", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["ours_ms"] > 0


def test_simulate_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "moe-layer.json"
    rows = [
        {
            "setting": "cpu-10",
            "shape": "lite",
            "widths": [256, 256, 8, 2],
            "tokens_per_rank": tokens,
            "transport": "gloo",
            "chunks": 1,
            "mode": "serial",
            "ours_ms": 11 + tokens / 20,
            "compute_ms": 1 + tokens / 25,
            "comm_ms": 10.0,
        }
        for tokens in (16, 32, 64, 128)
    ]
    results.write_text(json.dumps({"rows": rows}))
    asked = ("--topology", "cpu-10", "--gpus", "10", "--calibrate", str(results))
    assert run("simulate", *asked) == 0
    printed = capsys.readouterr().out
    assert "held out: 2 rows" in printed
    assert "slower while exchanging" in printed
    model = ("--model", "mixtral-lite", "--tokens-per-rank", "64", "--json")
    assert run("simulate", *asked, *model) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ours_ms"] > 0
    assert figures["calibration"]["held_out_error"]["mean"] < 0.3


def test_what_cannot_be_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("simulate", "--topology", "cpu-10", "--gpus", "10") == 2
    assert "give --model, or --calibrate" in capsys.readouterr().err
    assert run("simulate", "--topology", "cpu-10", "--gpus", "11", "--model", "mixtral-lite") == 2
    assert "describes 10 ranks and 11 are asked for" in capsys.readouterr().err


def test_topology_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("topology", "show", "10x2080ti-pcie") == 0
    printed = capsys.readouterr().out
    assert "rank 9: rtx-2080-ti" in printed
    assert "no peer-to-peer copies over PCIe" in printed
    assert run("topology", "show", "10x2080ti") == 2
    assert "10x2080ti-pcie" in capsys.readouterr().err


@pytest.fixture
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "read_driver", Driver)
    monkeypatch.setattr(loopback, "_SECONDS", 0.02)


@pytest.mark.usefixtures("no_cards")
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_topology_probe_of_a_machine_without_cards(tmp_path: Path, num_ranks: int) -> None:
    path = tmp_path / "laptop.toml"
    assert run("topology", "probe", "-o", str(path), "--gpus", str(num_ranks)) == 0
    topology = read_topology(path)
    assert (topology.name, topology.num_ranks) == ("laptop", num_ranks)
    assert topology.device(0).reached_flops_per_second > 1e8
    assert len(topology.fabrics) == (num_ranks > 1)


@pytest.mark.usefixtures("no_cards")
def test_probes_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("topology", "probe", "-o", str(tmp_path / "none" / "a.toml")) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert run("topology", "probe", "-o", str(tmp_path / "a.toml"), "--gpus", "65") == 2
    assert "give 1 to 64 ranks" in capsys.readouterr().err


def test_a_driver_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probing, "read_driver", lambda: Driver(error="Driver Not Loaded"))
    assert run("topology", "probe", "-o", str(tmp_path / "a.toml")) == 1
    assert "does not answer (Driver Not Loaded)" in capsys.readouterr().err
