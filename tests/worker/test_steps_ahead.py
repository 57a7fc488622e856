"""Real steps planned ahead: unknown tokens, replays behind replays, and the answers of before."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightmoe.core import Batch, Request, SamplingParams, StepResult
from lightmoe.engine.engine import Engine, SchedulerConfig
from lightmoe.models.find import find_model
from lightmoe.telemetry.rank_recorder import TraceConfig, rank_file
from lightmoe.telemetry.trace_file import read_trace
from lightmoe.worker import graphs
from lightmoe.worker.config import BLOCK_SIZE, WorkerConfig
from lightmoe.worker.worker import Worker, run_steps
from tests.engine.fakes import Answer
from tests.worker.groups import info_of, new_config, running_engine

WAIT_SECONDS = 60.0
PROMPTS = [tuple((7 * one + 3 * place) % 3000 for place in range(3 + 9 * one)) for one in range(5)]
EACH = [
    SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.9, max_tokens=17, seed=3, ignore_eos=True),
    SamplingParams(temperature=0.7, top_k=20, max_tokens=24, seed=4, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=20, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class QueuedRank:
    """A WorkerGroup of one rank in the loop that Ray's actors run; counts steps behind others."""

    block_size = BLOCK_SIZE

    def __init__(self, config: WorkerConfig) -> None:
        self.placement = config.placement
        self.worker = Worker(0, config)
        self.worker.join(0)
        self.ranks = [self.worker.load()]
        self.num_behind = 0
        self._plans: queue.Queue[Batch | None] = queue.Queue()
        self._results: queue.Queue[StepResult] = queue.Queue()
        follows = self.worker.follows

        def counted(plan: Batch) -> bool:
            may = follows(plan)
            self.num_behind += may
            return may

        self.worker.follows = counted  # type: ignore[method-assign]
        self._thread = threading.Thread(
            target=run_steps, args=(self.worker, self._plans.get, self._results.put), daemon=True
        )
        self._thread.start()

    def begin(self, batches: Sequence[Batch]) -> None:
        self._plans.put(batches[0])

    def finish(self) -> list[StepResult]:
        return [self._results.get(timeout=WAIT_SECONDS)]

    def check(self) -> None:
        assert self._thread.is_alive()

    def close(self) -> None:
        self._plans.put(None)
        self._thread.join(WAIT_SECONDS)


def config_on(device: str) -> WorkerConfig:
    config = new_config(find_model("mixtral-lite"), 1, max_model_len=256, max_num_seqs=8)
    half = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float16"
    return replace(config, device=device, dtype="float32" if device == "cpu" else half)


@contextmanager
def engine_over(group: QueuedRank, config: WorkerConfig) -> Iterator[Engine]:
    limits = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32)
    engine = Engine(info_of(config), group, limits, route=config.route)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def answers_of(engine: Engine, params: Sequence[SamplingParams]) -> list[list[int]]:
    answers = [Answer() for _ in params]
    for place, (prompt, one, answer) in enumerate(zip(PROMPTS, params, answers, strict=True)):
        engine.submit(Request(request_id=str(place), prompt_token_ids=prompt, params=one), answer)
    for answer in answers:
        answer.wait()
        assert answer.error is None
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_those_of_steps_that_wait_for_each_other(device: str) -> None:
    config = config_on(device)
    with running_engine(config, 8, 32) as engine:
        wanted = answers_of(engine, EACH)

    group = QueuedRank(config)
    with engine_over(group, config) as engine:
        found = [answers_of(engine, EACH) for _ in range(2)]

    assert found == [wanted, wanted]
    assert (group.num_behind > 10) is (device == "cuda")


@pytest.mark.gpu
def test_a_graph_that_was_forgotten_is_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_on("cuda")
    with running_engine(config, 8, 32) as engine:
        wanted = answers_of(engine, EACH)
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)

    group = QueuedRank(config)
    with engine_over(group, config) as engine:
        found = [answers_of(engine, EACH) for _ in range(2)]
    assert group.worker._runner is not None
    kept = group.worker._runner._graphs
    assert kept is not None
    assert len(kept._recorded) == 2

    assert found == [wanted, wanted]


def steps_that_follow(config: WorkerConfig, count: int) -> list[int]:
    """Those that may begin behind another, of a rank that has a graph for each."""
    worker = Worker(0, config)
    worker.join(0)
    worker.load()
    assert worker._runner is not None
    worker._runner.is_quick = lambda batch: True  # type: ignore[method-assign]
    following = []
    with torch.inference_mode():
        for number in range(count):
            batch = Batch(number, (0,))
            if worker.follows(batch):
                following.append(number)
            assert worker.begin(batch).result().step == number
    worker.finish()
    return following


def test_a_trace_holds_up_only_the_steps_that_it_records(tmp_path: Path) -> None:
    config = config_on("cpu")
    window = TraceConfig(folder=tmp_path, first_step=4, num_steps=3)

    assert steps_that_follow(config, 12) == list(range(12))
    traced = steps_that_follow(replace(config, trace=window), 12)

    assert traced == [0, 1, 2, 7, 8, 9, 10, 11]  # 3 runs under the profilers, too
    assert [step for _, step in read_trace(rank_file(tmp_path, 0)).steps] == [4, 5, 6]
