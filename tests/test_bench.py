"""`lightmoe bench`: its figures on made-up times and loads, and whole runs on small targets."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lightmoe import cli
from lightmoe.bench.command import (
    Run,
    bench_server,
    check_fits,
    command_line,
    launch_config,
    parse_routings,
    save,
    shown,
)
from lightmoe.bench.measure import (
    decode_rate,
    measure,
    output_rate,
    percentiles,
    prefill_rate,
    timings,
)
from lightmoe.bench.report import Report, commit, new_folder, waited
from lightmoe.bench.straggler import Straggler, find_straggler, load_between, max_over_mean
from lightmoe.bench.sweep import Prompts, Sweep, parse_numbers
from lightmoe.bench.targets import EngineTarget, Facts, ServerTarget, Stream
from lightmoe.core import LoadReport
from lightmoe.errors import LightMoEError, RankError, RequestError, UsageError
from lightmoe.server.tokenizer import Tokenizer
from tests.models.folders import write_config
from tests.server.fakes import FakeEngine, new_engine, running_server, wait_until, write_tokenizer
from tests.worker.groups import new_config, running_engine

STEP = 0.01


def lockstep(first_steps: Sequence[int], num_tokens: int, asked: float = 0.0) -> list[Stream]:
    """Sequences that get a token every step from their first one on."""
    return [
        Stream(asked, [(first + place) * STEP for place in range(num_tokens)])
        for first in first_steps
    ]


# Figures


def test_percentiles_of_a_hundred_and_one() -> None:
    values = percentiles([place / 1000 for place in reversed(range(101))])
    assert values == pytest.approx({"p50": 50, "p95": 95, "p99": 99, "num_samples": 101})


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50))
def test_percentiles_lie_between_the_two_samples_around_their_place(samples: list[float]) -> None:
    ordered = sorted(samples)
    for name, value in percentiles(samples).items():
        if name != "num_samples":
            place = int(name[1:]) / 100 * (len(ordered) - 1)
            low, high = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
            assert value == pytest.approx(1e3 * (low + (high - low) * (place - int(place))))


def test_rates_of_sequences_in_lockstep() -> None:
    run = lockstep([2, 3, 6], num_tokens=10)
    assert decode_rate(run) == pytest.approx(3 / STEP)
    assert prefill_rate(run, 40) == pytest.approx(3 * 40 / (6 * STEP))
    assert output_rate(run) == pytest.approx(30 / (15 * STEP))


def test_one_slow_sequence_counts_for_itself_only() -> None:
    slow = Stream(0.0, [0.02, 0.04, 0.06, 0.08])
    fast = Stream(0.0, [0.01 * place for place in range(1, 10)])
    assert decode_rate([slow, fast]) == pytest.approx(1 / 0.02 + 1 / 0.01)


@pytest.mark.parametrize("first_steps", [[1, 11], [1, 40], [1, 10]])
def test_no_decode_rate_where_one_has_ended_before_another_begins(first_steps: list[int]) -> None:
    assert decode_rate(lockstep(first_steps, num_tokens=10)) is None


def test_timings_take_all_answers_of_all_runs() -> None:
    runs = [lockstep([2, 3], 10), lockstep([4, 5], 10)]
    row = timings([lockstep([8, 8], 1)], runs, prompt_length=100)
    assert row["ttft_ms"]["p50"] == pytest.approx(35)
    assert row["ttft_ms"]["num_samples"] == 4
    assert row["inter_token_ms"]["p99"] == pytest.approx(10)
    assert row["inter_token_ms"]["num_samples"] == 4 * 9
    assert row["prefill_tokens_per_second"]["median"] == pytest.approx(2500)
    assert row["decode_tokens_per_second"]["num_samples"] == 2
    late = timings([lockstep([1, 1], 1)], [*runs, lockstep([1, 50], 10)], prompt_length=100)
    assert late["decode_tokens_per_second"] is None


# Straggler


def load_of(
    expert_tokens: list[list[int]], rank_pairs: list[list[int]], placement: Any
) -> LoadReport:
    return LoadReport(
        expert_tokens=np.array(expert_tokens),
        rank_pairs=np.array(rank_pairs),
        rank_kinds=["home", "home", "spare"],
        placement=placement,
        num_steps=4,
        rank_seconds=[1.0, 2.0, 3.0],
    )


TWO_LAYERS = [[[0], [0], [1], [1, 2]], [[0], [0], [1], [1]]]


def test_straggler_is_the_worst_rank_layer_and_expert() -> None:
    load = load_of([[10, 20, 30, 40], [50, 0, 30, 20]], [[30, 50], [50, 50], [20, 0]], TWO_LAYERS)
    found = find_straggler(load)
    assert found is not None
    assert (found.rank, found.layer, found.kind) in {(0, 1, "home"), (1, 0, "home")}
    assert found.rank_over_mean == pytest.approx(1.5)
    assert max_over_mean(load) == pytest.approx(1.5)


def test_an_expert_with_replicas_counts_in_parts() -> None:
    placement = [[[0], [0], [1], [1, 2]]]
    found = find_straggler(load_of([[1, 1, 25, 40]], [[2], [50], [15]], placement))
    assert found is not None
    assert (found.rank, found.expert) == (1, 2)
    assert found.expert_over_mean == pytest.approx(25 / (67 / 4))
    found = find_straggler(load_of([[1, 1, 15, 40]], [[2], [15], [40]], placement))
    assert found is not None
    assert (found.rank, found.kind, found.expert) == (2, "spare", 3)
    assert "rank 2 (spare), layer 0" in str(found)
    homes_only = load_of([[1, 1, 15, 40]], [[2], [55], [0]], placement)
    found = find_straggler(replace(homes_only, route="none"))
    assert found is not None
    assert (found.rank, found.expert) == (1, 3)


def test_nobody_is_waited_for_where_nothing_ran() -> None:
    assert find_straggler(load_of([[0] * 4], [[0], [0], [0]], [[[0], [0], [1], [2]]])) is None


def test_a_load_between_two_reports() -> None:
    before = load_of([[1, 2, 3, 4]], [[3], [3], [4]], [[[0], [0], [1], [2]]])
    after = replace(
        before,
        expert_tokens=before.expert_tokens * 3,
        rank_pairs=before.rank_pairs * 3,
        num_steps=9,
        rank_seconds=[2.0, 2.5, 3.0],
    )
    between = load_between(before, after)
    assert between.expert_tokens.tolist() == [[2, 4, 6, 8]]
    assert between.rank_pairs.tolist() == [[6], [6], [8]]
    assert (between.num_steps, between.rank_seconds) == (5, [1.0, 0.5, 0.0])


# One row


class ScriptedTarget:
    """Two sequences in lockstep, the second `lag` steps behind."""

    def __init__(self, lag: int, max_model_len: int = 500) -> None:
        self.lag = lag
        self.runs: list[tuple[list[tuple[int, ...]], int]] = []
        self.facts = Facts(
            model="m",
            routing="natural",
            summary="",
            vocab_size=9,
            max_model_len=max_model_len,
            max_batch_size=8,
        )

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Stream]:
        self.runs.append(([tuple(prompt) for prompt in prompts], num_tokens))
        return lockstep([1, 1 + self.lag], num_tokens)

    def load(self) -> LoadReport:
        done = len(self.runs)
        placement = [[[0], [0], [1], [2]]]
        load = load_of([[0, done, 0, 0]], [[2 * done], [done], [0]], placement)
        return replace(load, num_steps=done, rank_seconds=[float(done)] * 3)

    def num_preemptions(self) -> int:
        return len(self.runs)


def test_a_row_is_measured_after_warm_ups_that_find_how_long_answers_must_be() -> None:
    target = ScriptedTarget(lag=30)
    sweep = Sweep(output_length=20, num_repeats=3, num_warmups=3)
    row = measure(target, Prompts(9, 0), 2, 5, sweep)
    lengths = [num_tokens for _, num_tokens in target.runs]
    assert lengths == [20, 40, 50, 1, 50, 1, 50, 1, 50]
    assert row["decode_tokens_per_second"]["median"] == pytest.approx(2 / STEP)
    assert row["straggler"]["rank"] == 0
    assert row["straggler"]["expert"] == 1
    assert row["num_preemptions"] == 6
    assert row["rank_step_ms"] == [1000.0] * 3
    prompts = [tuple(prompts) for prompts, _ in target.runs]
    assert len(set(prompts)) == len(prompts)
    assert all(len(prompt) == 5 for run in prompts for prompt in run)


def test_answers_stay_within_the_context_and_a_gap_is_said() -> None:
    target = ScriptedTarget(lag=90, max_model_len=50)
    row = measure(target, Prompts(9, 0), 2, 5, Sweep(output_length=20))
    assert {num_tokens for _, num_tokens in target.runs[2:]} == {1, 45}
    assert row["decode_tokens_per_second"] is None
    lines = waited([row])
    assert "never decoded all at once" in lines[0]
    assert "6 preemptions" in lines[1]
    report = Report(command="lightmoe bench", config={}, model="m", rows=[row])
    assert find_in_table(report, "not all at once")


def find_in_table(report: Report, text: str) -> bool:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(report.table())
    return text in captured.get()


# What may be asked for


def test_prompts_repeat_by_seed_and_differ_within_a_run() -> None:
    first, again = Prompts(50, seed=3), Prompts(50, seed=3)
    taken = [first.take(4, 6) for _ in range(3)]
    assert taken == [again.take(4, 6) for _ in range(3)]
    assert len({prompt for run in taken for prompt in run}) == 12
    assert all(0 <= token < 50 for run in taken for prompt in run for token in prompt)


def test_prompts_are_pieces_of_a_text() -> None:
    text = list(range(100, 140))
    for prompt in Prompts(500, 0, text).take(20, 10):
        assert list(prompt) == list(range(prompt[0], prompt[0] + 10))
    with pytest.raises(UsageError, match="40 tokens, a prompt is to have 41"):
        Prompts(500, 0, text).take(1, 41)


@pytest.mark.parametrize("text", ["", "1,,2", "1.5", "-1", "a", "1 2", "²"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="give numbers such as 1,8,32"):
        parse_numbers(text, "batch_sizes")


def test_cells_and_their_bounds() -> None:
    assert parse_numbers("8, 1", "batch_sizes") == (8, 1)
    sweep = Sweep(batch_sizes=(8, 1, 8), prompt_lengths=(64, 32))
    assert sweep.cells() == [(1, 32), (8, 32), (1, 64), (8, 64)]
    for wrong in ({"batch_sizes": (0,)}, {"output_length": 1}, {"num_repeats": 0}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} has [01]; give numbers from"):
            Sweep(**wrong)


def test_routings() -> None:
    assert parse_routings("natural, zipf:0.6,natural") == ["natural", "zipf:0.6"]
    with pytest.raises(UsageError, match="routing_skew is 'zip'"):
        parse_routings("uniform,zip")


def test_a_launch_runs_the_largest_batch_at_once() -> None:
    values = {"model": "m", "gpus": 4}
    large = Sweep(batch_sizes=(1, 256))
    config = launch_config(values, "zipf:1.0", large)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (64, 512)
    assert config.routing_skew == "zipf:1.0"
    assert launch_config(values, "natural", Sweep()).max_num_seqs == 16
    assert launch_config(values, "natural", Sweep()).routing_skew is None
    huge = launch_config(values, "uniform", Sweep(batch_sizes=(4096,)))
    assert (huge.max_num_seqs, huge.max_num_batched_tokens) == (1024, 1024)
    kept = launch_config({**values, "max_num_seqs": 64}, "uniform", large)
    assert kept.max_num_seqs == 64
    with pytest.raises(UsageError, match="a batch of 256 .* give --max-num-seqs 64"):
        launch_config({**values, "max_num_seqs": 63}, "uniform", large)
    with pytest.raises(UsageError, match=r"max_num_batched_tokens \(32\) is below max_num_seqs"):
        launch_config({**values, "max_num_batched_tokens": 32}, "uniform", large)


def test_cells_that_cannot_run_are_refused_before_any_does() -> None:
    target = ScriptedTarget(lag=1, max_model_len=100)
    check_fits(target, Sweep(prompt_lengths=(36,), batch_sizes=(8,)))
    with pytest.raises(UsageError, match="prompts of 37 tokens and 64 more are over the 100"):
        check_fits(target, Sweep(prompt_lengths=(8, 37), batch_sizes=(8,)))
    with pytest.raises(UsageError, match="a batch of 9 is over the 8 requests"):
        check_fits(target, Sweep(prompt_lengths=(8,), batch_sizes=(1, 9)))
    assert target.runs == []


# Targets


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Iterator[FakeEngine]:
    engine = new_engine(tokenizer)
    yield engine
    engine.close()


@pytest.fixture
def url(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[str]:
    with running_server(engine, tokenizer, api_keys=["key"]) as url:
        yield url


def test_a_whole_run_against_a_server(
    url: str, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightmoe", "bench", "--url", url])
    sweep = Sweep(batch_sizes=(1, 3), prompt_lengths=(4, 8), output_length=5, num_repeats=2)
    said: list[str] = []
    folder = tmp_path / "new" / "folder"
    run = Run(sweep=sweep, folder=folder, say=said.append)
    report = bench_server(url, None, {"api_key": "key"}, run)
    json_path, png_path = save(report, folder)
    document = json.loads(Path(json_path).read_text())
    assert document["command"] == f"lightmoe bench --url {url}"
    assert document["model"] == "tiny"
    assert [(row["batch_size"], row["prompt_length"]) for row in document["rows"]] == [
        (1, 4),
        (3, 4),
        (1, 8),
        (3, 8),
    ]
    for row in document["rows"]:
        assert row["ttft_ms"]["num_samples"] == 2 * row["batch_size"]
        assert 0 < row["ttft_ms"]["p50"] <= row["ttft_ms"]["p95"] <= row["ttft_ms"]["p99"]
        assert row["prefill_tokens_per_second"]["min"] > 0
        assert row["output_tokens_per_second"]["min"] > 0
        assert row["num_preemptions"] is None
        assert row["straggler"] is None  # this engine's load never changes
    assert Path(png_path).read_bytes().startswith(b"\x89PNG")
    assert "natural: batch 3, prompts of 8 tokens" in said
    assert all(request.params.ignore_eos for request in engine.submitted)
    assert {len(request.prompt_token_ids) for request in engine.submitted} == {4, 8}
    assert find_in_table(report, "nobody")


def test_a_batch_of_256_runs_at_once_on_a_server(url: str, engine: FakeEngine) -> None:
    engine.hold_after = 1
    with ServerTarget(url, "key") as target:
        streams: list[Stream] = []
        prompts = Prompts(target.facts.vocab_size, 0).take(256, 3)
        thread = threading.Thread(target=lambda: streams.extend(target.run(prompts, 3)))
        thread.start()
        wait_until(lambda: engine.num_running == 256, "256 requests run", 60)
        engine.hold_after = None
        thread.join(60)
    assert [len(stream.tokens) for stream in streams] == [3] * 256
    assert all(stream.tokens == sorted(stream.tokens) for stream in streams)


def test_errors_of_a_server_are_raised_as_they_are(url: str, engine: FakeEngine) -> None:
    with ServerTarget(url, "key") as target:
        assert target.facts.routing == "natural"
        with pytest.raises(RequestError, match="128"):
            target.run([[2] * 100], 100)
        engine.failure, engine.fail_after = RankError("rank 3 died"), 1
        with pytest.raises(RankError, match="rank 3 died"):
            target.run([[2], [3], [4]], 5)
    with pytest.raises(RequestError, match="key"):
        ServerTarget(url, "wrong")


def test_a_server_says_that_its_routing_is_made_up(url: str, engine: FakeEngine) -> None:
    engine.model = replace(engine.model, routing_skew="zipf:1.0")
    with ServerTarget(url, "key") as target:
        assert target.facts.routing == "zipf:1.0"
        assert target.facts.vocab_size == engine.model.vocab_size


def test_an_engine_in_this_process(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    config = new_config(folder, 2, load_format="dummy", max_num_seqs=3)
    with running_engine(config, 3, 64) as engine:
        target = EngineTarget(engine, "two ranks", "natural")
        row = measure(target, Prompts(50, 0), 5, 9, Sweep(output_length=4, num_repeats=2))
        assert row["decode_tokens_per_second"]["median"] > 0
        assert row["straggler"]["rank"] in (0, 1)
        assert len(row["rank_step_ms"]) == 2
        assert min(row["rank_step_ms"]) > 0
        with pytest.raises(RequestError, match="token id 50"):
            target.run([[1] * 4, [50]], 100)
        wait_until(lambda: engine.stats().num_running == 0, "what was submitted is ended")


# Around it


def test_charts_leave_a_gap_and_name_each_routing(tmp_path: Path) -> None:
    from lightmoe.bench.figure import draw

    rows = [
        measure(ScriptedTarget(lag=2), Prompts(9, 0), size, 5, Sweep(output_length=8))
        | {"routing": routing, "batch_size": size}
        for routing in ("uniform", "zipf:1.0")
        for size in (1, 2, 4)
    ]
    rows[1]["decode_tokens_per_second"] = None
    figure = draw(Report(command="", config={}, model="m", rows=rows))
    points = [[len(line.get_xdata()) for line in axes.get_lines()] for axes in figure.axes]
    assert points == [[3, 3], [3, 3], [3, 3], [2, 3]]
    texts = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert "uniform (fullest rank up to 2.00× mean)" in texts
    assert "zipf:1.0" in texts
    figure.savefig(tmp_path / "bench.png")


def test_without_matplotlib_the_numbers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    written = save(Report(command="", config={}), tmp_path)
    assert "lightmoe[plot]" in str(written[1])


def test_a_commit_only_in_a_checkout(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    (tmp_path / ".git").write_text("gitdir: /nowhere")
    assert commit(tmp_path) is None


@pytest.mark.parametrize("given", [["--api-key", "secret"], ["--api-key=secret"]])
def test_the_key_is_not_written(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightmoe", "bench", *given, "--gpus", "2"])
    assert command_line() == "lightmoe bench --api-key ... --gpus 2"
    config = launch_config({"model": "m", "gpus": 2, "api_key": "secret"}, "uniform", Sweep())
    assert "secret" not in str(shown(config, "one line"))


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="is no folder"):
        new_folder(file)
    with pytest.raises(LightMoEError, match="cannot be made"):
        new_folder(file / "below")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes", "x", "--url", "http://127.0.0.1:1"], "batch_sizes is 'x'"),
        (["--url", "http://127.0.0.1:1", "--gpus", "4"], "--gpus has no meaning with --url"),
        (["--url", "http://127.0.0.1:1", "--routing-skew", "uniform"], "--routing-skew has no"),
        (["--url", "http://127.0.0.1:1", "--text", "x"], "--text has no meaning"),
        (["cpu-10", "--url", "http://127.0.0.1:1"], "a recipe has no meaning"),
        (["--model", "mixtral-lite"], "gpus is missing"),
        (["--model", "mixtral-lite", "--gpus", "2", "--text", "missing.txt"], "cannot be read"),
        (["--model", "m", "--gpus", "4", "--routing-skew", "zipf"], "routing_skew is 'zipf'"),
        (["--model", "m", "--gpus", "4", "--max-num-seqs", "2"], "give --max-num-seqs 8"),
        (["--output-length", "1"], "output_length has 1"),
    ],
)
def test_wrong_usage_ends_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments, "-o", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_nobody_there_ends_with_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--url", "http://127.0.0.1:1", "-o", str(tmp_path)])
    assert ended.value.code == 1
    assert "nothing answers" in capsys.readouterr().err


def test_against_a_server_nothing_heavy_is_loaded() -> None:
    script = (
        "import sys, lightmoe.bench.command;"
        "print(sorted({'torch', 'ray', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_straggler_in_words() -> None:
    straggler = Straggler(
        rank=3, kind="home", layer=2, rank_over_mean=1.8, expert=5, expert_over_mean=3.1
    )
    assert str(straggler) == "rank 3, layer 2: 1.80x\n(expert 5: 3.10x)"
