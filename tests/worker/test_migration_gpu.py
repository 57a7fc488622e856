"""Ten ranks on one card serve while their experts move at every step: no bit of an answer changes.

The pieces go from card to card by the copy engines, and through the hosts' memory. Run with
pytest -m gpu.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lightmoe.config import LaunchConfig
from lightmoe.core import Request, RequestOutput, SampledToken, SamplingParams
from lightmoe.engine.engine import Engine, SchedulerConfig
from lightmoe.launch import start_workers
from tests.worker.test_live_migration import Restless

pytestmark = pytest.mark.gpu

NUM_FREE_SLOTS = 8  # for random placements that fill ranks unevenly
PROMPTS = [
    tuple((11 * one + 5 * place) % 3000 for place in range(3 + 9 * one)) for one in range(12)
]
PATIENCE_SECONDS = 120.0
# The best five log-probabilities of every token show a changed bit where the token itself may not.
PARAMS = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=5)
EXPERT_BYTES = 3 * 256 * 256 * 4


class Switched(Restless):
    """Restless while `is_on`."""

    is_on = False

    def orders(self, placement: Any, route: str) -> Any:
        return super().orders(placement, route) if self.is_on else None

    def observe(self, expert_tokens: Any, results: Any) -> None:
        if self._migration is not None:
            super().observe(expert_tokens, results)


class Recorded:
    """Keeps the tokens of one request, with their log-probabilities."""

    def __init__(self) -> None:
        self.tokens: list[SampledToken] = []
        self.last: RequestOutput | None = None
        self._ended = threading.Event()

    def __call__(self, output: RequestOutput) -> None:
        self.tokens += output.tokens
        self.last = output
        if output.finish_reason is not None:
            self._ended.set()

    def wait(self) -> None:
        assert self._ended.wait(PATIENCE_SECONDS)
        assert self.last is not None
        if self.last.error is not None:
            raise self.last.error


def answers_of(engine: Engine) -> list[list[tuple[object, ...]]]:
    """Token, log-probability and the likeliest five, of every position of every prompt."""
    answers = [Recorded() for _ in PROMPTS]
    for place, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        engine.submit(
            Request(request_id=str(place), prompt_token_ids=prompt, params=PARAMS), answer
        )
    for answer in answers:
        answer.wait()
    return [[(one.token_id, one.logprob, one.top) for one in answer.tokens] for answer in answers]


@pytest.mark.parametrize(
    ("transport", "peer_memory"),
    [("copy_engine", "device"), ("copy_engine", "host"), ("nccl", "auto")],
)
def test_bits_stay_before_during_and_after_migrations(transport: Any, peer_memory: Any) -> None:
    config = LaunchConfig(
        model="mixtral-lite",
        gpus=10,
        device="cuda",
        oversubscribe=True,
        dtype="float32",
        transport=transport,
        peer_memory=peer_memory,
        max_model_len=256,
        max_num_batched_tokens=64,
        free_slots=NUM_FREE_SLOTS,
    )
    group = start_workers(config, lambda stage, done, total: None)
    # An expert takes several steps, so that others are read while it is on its way.
    balancer = Switched(group.group, bytes_per_step=EXPERT_BYTES // 3)
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)
    engine = Engine(group.model, group.group, limits, balancer=balancer)
    engine.start()
    try:
        before = answers_of(engine)
        num_quiet = engine.stats().num_steps
        balancer.is_on = True
        during = [answers_of(engine) for _ in range(3)]
        num_moving = engine.stats().num_steps - num_quiet
        balancer.is_on = False
        after = answers_of(engine)
        engine.set_route("even")  # other copies of the moved experts compute
        even = answers_of(engine)
    finally:
        engine.close()

    assert [len(answer) for answer in before] == [PARAMS.max_tokens] * len(PROMPTS)
    assert during == [before] * 3
    assert after == before
    assert even == before
    assert balancer.num_pieces > num_moving
    assert len(balancer.epochs) > num_moving / 10
    assert balancer.epochs == list(range(1, len(balancer.epochs) + 1))
