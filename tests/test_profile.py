"""`lightmoe profile`: steps that are alike, and traces of real ranks that say what they sent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from lightmoe import cli, profile
from lightmoe.core import Batch, ModelInfo, SamplingParams, StepResult
from lightmoe.errors import UsageError
from lightmoe.llm import LLM
from lightmoe.profile import Workload, profile_with_nsys, run_workload
from lightmoe.telemetry.overlap import bytes_per_link, overlap_of
from lightmoe.telemetry.records import Record, Trace
from lightmoe.telemetry.trace_file import read_trace, write_trace
from lightmoe.telemetry.trace_folder import collect
from lightmoe.worker.config import WorkerConfig
from lightmoe.worker.local_group import LocalWorkerGroup
from tests.models.folders import MIXTRAL, write_model
from tests.telemetry.reports import two_ranks
from tests.telemetry.test_nsys_run import stand_in
from tests.telemetry.traces import record
from tests.test_end_to_end import launched
from tests.worker.groups import new_config

ELEMENT_BYTES = 4
WIDTH = MIXTRAL["hidden_size"]
NUM_LAYERS = MIXTRAL["num_hidden_layers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), eos_token_id=None)


class WatchedGroup(LocalWorkerGroup):
    """Keeps what every rank was asked and what it answered."""

    def __init__(self, config: WorkerConfig) -> None:
        self.batches: list[Sequence[Batch]] = []
        self.results: list[list[StepResult]] = []
        super().__init__(config)

    def begin(self, batches: Sequence[Batch]) -> None:
        self.batches.append(batches)
        super().begin(batches)

    def finish(self) -> list[StepResult]:
        self.results.append(super().finish())
        return self.results[-1]


def run(folder: Path, traces: Path, num_ranks: int, work: Workload) -> tuple[WatchedGroup, Trace]:
    """A workload on ranks that are threads, and its trace."""
    config = replace(
        new_config(folder, num_ranks, max_num_seqs=work.batch),
        trace=work.window(traces, device_records=True),
        max_recorded_tokens=work.batch * work.prompt_tokens,
    )
    group = WatchedGroup(config)
    info = ModelInfo(
        name="tiny",
        folder=str(folder),
        architecture="",
        num_layers=NUM_LAYERS,
        num_experts=config.model.num_experts,
        vocab_size=config.model.vocab_size,
        max_model_len=config.max_model_len,
        eos_token_ids=(),
        generation_defaults={},
    )
    run_workload(group, info, work)
    return group, collect(traces, num_ranks, str(work))


def check_clocks(trace: Trace) -> None:
    """Nobody has everyone's choices before everyone has begun to send them."""
    slack_ns = 1_000_000
    routes: dict[tuple[int | None, int | None], list[Record]] = {}
    for one in trace.records:
        if one.name == "route":
            routes.setdefault((one.step, one.layer), []).append(one)
    assert routes
    for together in routes.values():
        assert len(together) == trace.num_ranks
        last_begin = max(one.start_ns for one in together)
        assert last_begin <= min(one.end_ns for one in together) + slack_ns


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_all_recorded_steps_of_all_ranks_are_alike(
    folder: Path, tmp_path: Path, phase: profile.Phase
) -> None:
    work = Workload(phase=phase, steps=2, batch=3, prompt_tokens=7)
    group, trace = run(folder, tmp_path, 3, work)

    steps = [step for rank, step in trace.steps if rank == 0]
    assert len(steps) == 2
    tokens = 3 * 7 if phase == "prefill" else 3
    for step in steps:
        for batch in group.batches[step]:
            assert batch.tokens_per_rank == (tokens,) * 3
            assert len(batch.sequences) == 3
            assert all(part.sampling is not None for part in batch.sequences)
    for records in trace.steps.values():
        names = [one.name for one in records]
        for name in ("step", "inputs", "sampler"):
            assert names.count(name) == 1
        for name in ("attention", "gate", "route", "pipeline", "dispatch", "experts", "combine"):
            assert names.count(name) == NUM_LAYERS
        assert names.count("collective") == 3 * NUM_LAYERS
        experts = [one for one in records if one.name == "experts"]
        assert [(one.layer, one.chunk) for one in experts] == [
            (layer, 0) for layer in range(NUM_LAYERS)
        ]
        (step_record,) = [one for one in records if one.name == "step"]
        for one in records:
            assert step_record.start_ns <= one.start_ns <= one.end_ns <= step_record.end_ns
    check_clocks(trace)


def test_ranks_say_how_many_bytes_they_sent_to_each(folder: Path, tmp_path: Path) -> None:
    """Rows x D x element size on the way out and pairs x D x element size on the way back."""
    work = Workload(phase="prefill", steps=2, batch=2, prompt_tokens=9)
    group, trace = run(folder, tmp_path, 3, work)

    homes = np.array([[ranks[0] for ranks in layer] for layer in group.placement.copies])
    steps = sorted({step for _, step in trace.steps})
    expected = np.zeros((3, 3), dtype=np.int64)
    for step in steps:
        for result in group.results[step]:
            assert result.routing is not None
            for layer in range(NUM_LAYERS):
                targets = homes[layer][result.routing[:, layer].astype(int)]  # [T, K]
                for target in range(3):
                    if target != result.rank:
                        num_rows = int((targets == target).any(axis=1).sum())
                        num_pairs = int((targets == target).sum())
                        expected[result.rank, target] += num_rows * WIDTH * ELEMENT_BYTES
                        expected[target, result.rank] += num_pairs * WIDTH * ELEMENT_BYTES
    assert expected.any()
    found = np.array(bytes_per_link(trace))
    assert np.abs(found - expected / len(steps)).max() <= 0.5  # means are rounded

    quiet = WatchedGroup(new_config(folder, 3))
    sequences = tuple(replace(part, sampling=None) for part in group.batches[0][0].sequences)
    quiet.begin([Batch(0, (18, 0, 0), sequences), Batch(0, (18, 0, 0)), Batch(0, (18, 0, 0))])
    quiet.finish()
    assert [worker._group.take_bytes_sent() for worker in quiet._workers] == [()] * 3
    quiet.close()


def test_prompts_differ_and_fit_the_vocabulary() -> None:
    requests = list(Workload(steps=1, batch=8, prompt_tokens=16).requests(4, 1000))
    assert len(requests) == 4 * 4 * 8
    assert len({request.prompt_token_ids for request in requests}) == len(requests)
    assert all(0 <= token < 1000 for request in requests for token in request.prompt_token_ids)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "--steps is 0; give at least 1"),
        ({"batch": 0}, "--batch is 0; give at least 1"),
        ({"prompt_tokens": -1}, "--prompt-tokens is -1; give at least 1"),
    ],
)
def test_a_workload_of_nothing_is_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Workload(**values)


def test_what_a_profile_sets_itself_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["profile", "--model", "mixtral-lite", "--gpus", "2", "--max-num-seqs", "4"])
    assert ended.value.code == 2
    assert "--max-num-seqs: a profile sets this itself" in capsys.readouterr().err


def test_nsys_that_is_missing_is_an_error_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        cli.main(["profile", "--model", "mixtral-lite", "--gpus", "2", "--nsys"])
    assert ended.value.code == 1
    assert "nsys is not on the PATH" in capsys.readouterr().err


def test_under_nsys_kernels_are_the_reports_and_bytes_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nsys, run = stand_in(tmp_path), tmp_path / "run"
    work = Workload(phase="decode", steps=1, batch=2, prompt_tokens=5)

    def run_nsys(path: Path, command: Sequence[str], folder: Path) -> Path:
        options = "--model=mixtral-lite --gpus=2 --phase=decode --steps=1 --batch=2"
        assert " ".join(command[1:]) == (
            f"-m lightmoe profile --under-nsys small {options} --prompt-tokens=5 --output={run}"
        )
        spans = [
            record("step", 0, 9, kind="span", rank=rank, step=4, bytes_sent=(rank, 5))
            for rank in (0, 1)
        ]
        write_trace(Trace(tuple(spans), "as the ranks saw it"), folder / "spans.json.gz")
        return two_ranks(folder / "trace.sqlite")

    monkeypatch.setattr(profile, "run_nsys", run_nsys)
    monkeypatch.setattr(profile, "_config", lambda *_: None)
    lines = profile_with_nsys("small", {"model": "mixtral-lite", "gpus": 2}, work, run, str(nsys))

    overlap = json.loads((run / "overlap.json").read_text())
    assert (overlap["source"], overlap["title"]) == ("kernels", "as the ranks saw it")
    assert overlap["exposed_share"] == pytest.approx(0.2)
    assert overlap["bytes_per_link"] == [[0, 5], [1, 5]]
    assert lines[-1] == str(run / "trace.nsys-rep")
    assert not (run / "spans.json.gz").exists()


def test_the_command_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightmoe", "profile", "--model", "mixtral-lite"]
    flags = "--gpus 2 --device cpu --phase decode --steps 2 --batch 2 --prompt-tokens 12 -o"
    ended = subprocess.run(
        [*command, *flags.split(), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    how, exposed, *_ = ended.stdout.splitlines()
    assert how.startswith("cpu (")
    assert exposed.startswith("exposed share ")
    written = sorted(one.name for one in (tmp_path / "run").iterdir())
    assert written == ["overlap.json", "timeline.png", "trace.json.gz"]
    overlap = json.loads((tmp_path / "run/overlap.json").read_text())
    assert (overlap["source"], overlap["num_ranks"], overlap["num_steps"]) == ("spans", 2, 2)
    assert 0 < overlap["exposed_share"] < 1
    assert overlap["bytes_per_link"][0][1] > 0
    check_clocks(read_trace(tmp_path / "run/trace.json.gz"))


def test_an_llm_leaves_a_trace_when_it_is_closed(tmp_path: Path) -> None:
    with LLM("mixtral-lite", gpus=2, device="cpu", trace=str(tmp_path)) as llm:
        llm.generate([1, 2, 3], SamplingParams(max_tokens=30, ignore_eos=True))
        llm.close()
    trace = read_trace(tmp_path / "trace.json.gz")
    assert (trace.num_ranks, overlap_of(trace)["num_steps"]) == (2, 16)


def test_a_server_leaves_a_trace_of_its_early_steps(tmp_path: Path) -> None:
    with launched("--gpus", "2", "--trace", str(tmp_path)) as server:
        answer = httpx.post(
            server.url + "/v1/completions",
            json={"model": "mixtral-lite", "prompt": "def f():", "max_tokens": 9},
            timeout=60,
        )
        assert answer.status_code == 200
        server.process.terminate()
        assert server.process.wait(timeout=60) == 0
    trace = read_trace(tmp_path / "trace.json.gz")
    assert trace.num_ranks == 2
    assert min(step for _, step in trace.steps) == 4
    assert overlap_of(trace)["num_steps"] == 5
