"""What `lightmoe simulate` asks and prints: a simulated pipeline, or how good the simulator is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightmoe.balancer.calibrate import Calibrated, calibrate, read_rows
from lightmoe.balancer.pipeline_tasks import Calibration, LayerShape
from lightmoe.balancer.simulate import UNCALIBRATED, Setup, Transport, simulate, summary
from lightmoe.errors import UsageError
from lightmoe.models.model_config import ModelConfig
from lightmoe.moe.transport_model import ExchangeShape, choose_transport, ways_on
from lightmoe.topology import Topology

DECODE_TOKENS = 16
"""Of a rank's decode step, where the transport is chosen: launch's --max-num-seqs."""

# Bytes of a quantised weight: its bits, and a 16-bit scale for 128 weights.
_WEIGHT_BYTES = {"int8": 1 + 2 / 128, "int4": 0.5 + 2 / 128}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What to simulate, or `measured` rows to fit to, or both: then with what was fitted."""

    topology: Topology
    model: ModelConfig | None
    model_name: str
    tokens_per_rank: int
    chunks: int
    micro_batches: int
    layers: int
    skew: float
    transport: Transport | None
    quantization: str
    seed: int
    measured: Path | None

    @property
    def on_cpu(self) -> bool:
        """Whether the ranks are CPU ranks."""
        return self.topology.device(0).kind == "cpu"

    @property
    def chosen_transport(self) -> tuple[Transport, str]:
        """The transport asked for, or what `launch --transport auto` takes; the same with why."""
        if self.transport is not None:
            return self.transport, f"{self.transport}, as asked"
        assert self.model is not None, "nothing to simulate"
        ways = ways_on(self.topology)
        if len(ways) < 2:
            only: Transport = "gloo" if self.on_cpu else "copy_engine"
            return only, only
        choice = choose_transport(
            self.topology,
            ways,
            ExchangeShape(
                num_experts=self.model.num_experts,
                num_experts_per_token=self.model.num_experts_per_tok,
                width=self.model.hidden_size,
                element_bytes=4 if self.on_cpu else 2,
            ),
            prefill_tokens=self.tokens_per_rank,
            decode_tokens=DECODE_TOKENS,
        )
        return choice.way.transport, f"{choice.way.label}: {choice.reason}"


def answer(question: Question) -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and the same as figures."""
    lines: list[str] = []
    figures: dict[str, Any] = {}
    fitted = None
    if question.measured is not None:
        fitted = calibrate(read_rows(question.measured), question.topology)
        lines += calibration_lines(fitted)
        figures["calibration"] = calibration_figures(fitted)
    if question.model is not None:
        transport, why = question.chosen_transport
        setup = _setup(question, transport, _calibration_for(transport, fitted))
        simulated = simulate(setup)
        lines += ["", *summary(setup, simulated)] if lines else summary(setup, simulated)
        lines.append(f"transport {why}")
        figures |= {"transport": transport, **simulated.to_json()}
    elif question.measured is None:
        raise UsageError("nothing to simulate; give --model, or --calibrate RESULTS.json, or both")
    return lines, figures


def _setup(question: Question, transport: Transport, calibration: Calibration) -> Setup:
    assert question.model is not None
    element_bytes = 4 if question.on_cpu else 2
    shape = LayerShape.of_model(
        question.model,
        question.model_name,
        element_bytes,
        _WEIGHT_BYTES.get(question.quantization, element_bytes),
    )
    return Setup(
        shape=shape,
        topology=question.topology,
        tokens_per_rank=question.tokens_per_rank,
        num_chunks=question.chunks,
        num_micro_batches=question.micro_batches,
        num_layers=question.layers,
        skew=question.skew,
        seed=question.seed,
        serial=question.on_cpu and question.micro_batches == 1,
        results_beside=transport == "copy_engine",
        calibration=calibration,
    )


def _calibration_for(transport: Transport, fitted: Calibrated | None) -> Calibration:
    """The parameters of the transport, of the first setting and mode that has any."""
    if fitted is None:
        return UNCALIBRATED[transport]
    for (_, measured, _), calibration in fitted.calibrations.items():
        if measured == transport:
            return calibration
    known = sorted({measured for _, measured, _ in fitted.calibrations})
    raise UsageError(f"no row was measured over {transport}; measured: {', '.join(known)}")


def calibration_lines(fitted: Calibrated) -> list[str]:
    """The parameters, every held-out row beside what was predicted for it, and the errors."""
    lines = []
    for (setting, transport, mode), found in fitted.calibrations.items():
        compute, exchange = found.compute, found.exchange
        lines.append(
            f"{setting}, {transport}, {mode}: a computing stage"
            f" {compute.alpha_seconds * 1e6:.0f} us + {compute.factor:.2f} x roofline, an exchange"
            f" {exchange.alpha_seconds * 1e6:.0f} us + {exchange.factor:.2f} x topology,"
            f" {found.slowdown:.0%} slower while exchanging"
        )
    lines.append("held out:  shape  tokens a rank  chunks  measured  simulated  error")
    for row in fitted.predicted:
        if row.held_out:
            lines.append(
                f"  {row.row['shape']:>14} {row.row['tokens_per_rank']:>14} {row.row['chunks']:>7}"
                f" {row.row['ours_ms']:>6.2f} ms {row.seconds * 1e3:>7.2f} ms {row.error:>+6.0%}"
            )
    for held_out in (False, True):
        errors = fitted.errors(held_out=held_out)
        what = "held out" if held_out else "fitted to"
        mean, worst = sum(errors) / len(errors), max(errors)
        lines.append(f"{what}: {len(errors)} rows, error {mean:.1%} mean, {worst:.1%} worst")
    return lines


def calibration_figures(fitted: Calibrated) -> dict[str, Any]:
    """The same for programs."""
    return {
        "parameters": [
            {"setting": setting, "transport": transport, "mode": mode, **asdict(found)}
            for (setting, transport, mode), found in fitted.calibrations.items()
        ],
        "rows": [
            {
                **_key(row.row),
                "simulated_ms": row.seconds * 1e3,
                "error": row.error,
                "held_out": row.held_out,
            }
            for row in fitted.predicted
        ],
        "held_out_error": _mean_and_worst(fitted.errors(held_out=True)),
        "fitted_error": _mean_and_worst(fitted.errors(held_out=False)),
    }


def _key(row: Any) -> dict[str, Any]:
    names = ("setting", "shape", "tokens_per_rank", "transport", "chunks", "mode", "ours_ms")
    return {name: row[name] for name in names}


def _mean_and_worst(errors: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(errors) / len(errors), "worst": max(errors)}
