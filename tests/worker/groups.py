"""WorkerConfigs sized as a launch sizes them, and engines over threads that stand for ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from lightmoe.core import (
    ModelInfo,
    OverflowRule,
    Request,
    SampledToken,
    SamplingParams,
    SamplingStep,
)
from lightmoe.engine.balance import RoutingRecorder, StepBalancer
from lightmoe.engine.engine import Engine, SchedulerConfig
from lightmoe.models.config import read_config
from lightmoe.worker import runner
from lightmoe.worker.config import WorkerConfig
from lightmoe.worker.local_group import LocalWorkerGroup
from lightmoe.worker.sampler import sample
from lightmoe.worker.sizing import Demand, size_ranks
from tests.engine.fakes import Answer


def new_config(
    folder: Path,
    num_ranks: int,
    num_spares: int = 0,
    max_model_len: int = 128,
    max_num_seqs: int = 4,
    load_format: str = "auto",
    seed: int = 0,
    timeout_seconds: float = 60.0,
) -> WorkerConfig:
    """What a launch on the CPU with 1 GiB for each rank would tell its ranks."""
    model = read_config(folder)
    sizing = size_ranks(
        Demand(
            model=model,
            num_ranks=num_ranks,
            num_spares=num_spares,
            element_bytes=4,
            rank_bytes=1 << 30,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            on_cpu=True,
        )
    )
    return WorkerConfig(
        model=model,
        folder=folder,
        load_format=load_format,
        placement=sizing.placement,
        route="waterfill",
        device="cpu",
        dtype="float32",
        max_model_len=max_model_len,
        num_kv_blocks=sizing.num_kv_blocks,
        num_threads=1,
        seed=seed,
        timeout_seconds=timeout_seconds,
    )


def info_of(config: WorkerConfig) -> ModelInfo:
    """What an engine must know of the model."""
    model = config.model
    return ModelInfo(
        name="test",
        folder=str(config.folder),
        architecture=model.architecture,
        num_layers=len(config.placement.copies),
        num_experts=model.num_experts,
        vocab_size=model.vocab_size,
        max_model_len=config.max_model_len,
        eos_token_ids=model.eos_token_ids,
        generation_defaults={},
    )


@contextmanager
def running_engine(
    config: WorkerConfig,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    new_balancer: Callable[[LocalWorkerGroup], StepBalancer] | None = None,
    recorder: RoutingRecorder | None = None,
    overflow: OverflowRule | None = None,
) -> Iterator[Engine]:
    """A started engine over LocalWorkerGroup, closed at the end."""
    info = replace(info_of(config), overflow=overflow)
    limits = SchedulerConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
    )
    group = LocalWorkerGroup(config)
    balancer = None if new_balancer is None else new_balancer(group)
    engine = Engine(info, group, limits, route=config.route, balancer=balancer, recorder=recorder)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[list[int]]:
    """Tokens of every prompt, all submitted at once."""
    answers = []
    for place, prompt in enumerate(prompts):
        answers.append(Answer())
        engine.submit(
            Request(request_id=str(place), prompt_token_ids=tuple(prompt), params=params),
            answers[-1],
        )
    for answer in answers:
        answer.wait()
        if answer.error is not None:
            raise answer.error
    return [answer.token_ids for answer in answers]


class LogitsRecorder:
    """Stands in for the sampler of all threads, and keeps what it was given."""

    def __init__(self) -> None:
        self.logits: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, sequence_id: int, logits: np.ndarray, step: SamplingStep) -> SampledToken:
        self.logits[sequence_id, step.position] = logits.copy()
        return sample(sequence_id, logits, step)

    def of_sequence(self, sequence_id: int) -> np.ndarray:
        """Logits [positions, V] in order."""
        positions = sorted(place for one, place in self.logits if one == sequence_id)
        assert positions == list(range(len(positions)))
        return np.stack([self.logits[sequence_id, place] for place in positions])


@contextmanager
def recorded_logits() -> Iterator[LogitsRecorder]:
    """Record every row of logits that is sampled from in this process."""
    recorder = LogitsRecorder()
    before, runner.sample = runner.sample, recorder
    try:
        yield recorder
    finally:
        runner.sample = before
