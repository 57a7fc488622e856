"""Decoding while experts migrate without a pause, against quiet: steps, inter-token latency.

    python benchmarks/bench_migration.py --model mixtral-lite --gpus 10 --device cpu
    python benchmarks/bench_migration.py --model qwen3-30b-a3b --gpus 4 --load-format dummy

The same prompts again and again, in turn with and without migrations, so that both see the same
machine and the same placements. Goals are plans for made-up loads, each made beside the steps as
a server's are; a rank sends and gets at most --bytes-per-step of experts beside one step. Counted
are steps in which every sequence gets one token.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import protocol

from lightmoe.balancer.gain import renumbered
from lightmoe.balancer.migration import Costs, Migration
from lightmoe.balancer.planner import plan
from lightmoe.collector import settle_objects
from lightmoe.config import LaunchConfig
from lightmoe.core import (
    BalanceReport,
    Orders,
    RankInfo,
    Request,
    RequestOutput,
    SamplingParams,
    StepResult,
)
from lightmoe.engine.engine import Engine, SchedulerConfig
from lightmoe.errors import PlacementError
from lightmoe.launch import start_workers
from lightmoe.machine import read_driver
from lightmoe.models.config import read_config
from lightmoe.models.find import find_model
from lightmoe.moe.placement import Placement

PROMPT_TOKENS = 16
SKEW = 1.0
"""Of the loads that goals are planned for. A mild one leaves the real load nearly level, but where
there are many experts its goals soon agree, and nothing moves."""


class Restless:
    """A StepBalancer that migrates from goal to goal while `is_moving`, and times every step.

    A step may begin before the one before it has ended, so its time is from that one's end on.
    """

    def __init__(
        self, ranks: Sequence[RankInfo], placement: Placement, num_free_slots: int
    ) -> None:
        self.is_moving = False
        self.bytes_per_step = 0
        self.skew = SKEW
        self.steps: list[tuple[float, int]] = []  # end in seconds, (token, expert) pairs
        self.moved_bytes = 0
        self.num_moved = 0
        self.num_migrations = 0
        self.waited_seconds = 0.0
        self._num_slots = [rank.num_slots for rank in ranks]
        self._usable = [count - num_free_slots for count in self._num_slots]
        self._num_spares = placement.rank_kinds.count("spare")
        self._expert_bytes = max(rank.expert_bytes for rank in ranks)
        self._random = np.random.default_rng(0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="goals")
        self._next: Future[Migration] | None = None
        self._migration: Migration | None = None
        self._next_transfer = 0

    def orders(self, placement: Placement, route: str) -> tuple[Orders, Placement] | None:
        """The next pieces and changes."""
        migration = self._current(placement) if self.is_moving else None
        if migration is None:
            return None
        changes, pieces = migration.orders()
        self.moved_bytes += sum(piece.end - piece.begin for piece in pieces)
        if not changes and not pieces:
            return None
        if changes:
            placement = placement.changed(changes, placement.epoch + 1)
        return Orders(placement.epoch, changes, pieces), placement

    def _current(self, placement: Placement) -> Migration | None:
        """The migration under way; None while the next one is being planned."""
        if self._migration is not None and self._migration.is_done:
            self._next_transfer = self._migration.num_transfers
            self._migration = None
            self.num_migrations += 1
        if self._migration is None:
            if self._next is None:
                self._next = self._thread.submit(self._plan, placement, self.bytes_per_step)
            if self._next.done():
                self._migration, self._next = self._next.result(), None
        return self._migration

    def _plan(self, placement: Placement, bytes_per_step: int) -> Migration:
        share = 1.0 / np.arange(1, placement.num_experts + 1) ** self.skew
        load = 1e6 * np.stack(
            [self._random.permutation(share) for _ in range(placement.num_layers)]
        )
        now = renumbered(placement)
        goal = plan(load, self._usable, num_spares=self._num_spares, previous=now)
        costs = Costs(expert_bytes=self._expert_bytes, bytes_per_step=bytes_per_step)
        return Migration(placement, goal, self._num_slots, costs, load, self._next_transfer)

    def observe(self, expert_tokens: np.ndarray, results: Sequence[StepResult]) -> None:
        """A step has ended."""
        self.steps.append((time.perf_counter(), int(expert_tokens.sum())))
        arrivals = [result.arrivals for result in results if result.arrivals is not None]
        for arrival in arrivals:
            if arrival.error is not None:
                raise PlacementError(arrival.error)
        self.waited_seconds += max((one.waited_seconds for one in arrivals), default=0.0)
        here = [number for arrival in arrivals for number in arrival.transfers]
        self.num_moved += len(here)
        if self._migration is not None:
            self._migration.arrived(here)

    def report(self) -> BalanceReport:
        """What has moved. It has no thread that could die, and keeps no events."""
        return BalanceReport(
            num_migrations=self.num_migrations,
            num_moved_experts=self.num_moved,
            moved_bytes=self.moved_bytes,
            waited_seconds=self.waited_seconds,
            heartbeat_age_seconds=0.0,
            error=None,
            events=(),
            num_events=0,
        )

    def close(self) -> None:
        """End the planner's thread."""
        self._thread.shutdown()


@dataclass
class Answer:
    """Tokens of one prompt and when each came."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    output: RequestOutput | None = None

    def __call__(self, output: RequestOutput) -> None:
        """On the engine's thread."""
        self.tokens += [token.token_id for token in output.tokens]
        self.times += [time.perf_counter()] * len(output.tokens)
        if output.finish_reason is not None:
            self.output = output
            self.ended.set()


@dataclass(frozen=True)
class Workload:
    """Prompts, tokens of an answer, and the pairs of all layers in a step that is counted."""

    prompts: list[tuple[int, ...]]
    num_tokens: int
    pairs_per_step: int

    @classmethod
    def of(cls, engine: Engine, batch: int, num_tokens: int, experts_per_token: int) -> Workload:
        """Random prompts."""
        draw, vocab_size = random.Random(0), engine.model.vocab_size
        prompts = [
            tuple(draw.randrange(vocab_size) for _ in range(PROMPT_TOKENS)) for _ in range(batch)
        ]
        return cls(prompts, num_tokens, batch * experts_per_token * engine.model.num_layers)


@dataclass
class Samples:
    """Seconds of counted steps, and between two tokens of a sequence."""

    steps: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    def row(self, name: str) -> dict[str, Any]:
        """Milliseconds."""
        return {
            f"{name}_{what}_ms": percentiles([1e3 * one for one in seconds])
            for what, seconds in (("step", self.steps), ("inter_token", self.between))
        }


def main() -> None:
    """Start the model once, measure every budget, write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mixtral-lite")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--placement", default="spare", choices=("spare", "spread"))
    parser.add_argument("--spares", type=int)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--peer-memory", default="auto")
    parser.add_argument("--batch", type=int, help="sequences; default: one a rank")
    parser.add_argument("--steps", type=int, default=2000, help="of each kind")
    parser.add_argument("--tokens", type=int, default=250, help="of an answer: steps of a turn")
    parser.add_argument("--bytes-per-step", type=int, nargs="+", default=[4 << 20])
    parser.add_argument("--skew", type=float, default=SKEW, help="of the loads planned for")
    parser.add_argument("--commit", help="the commit that is measured, where git does not know")
    options = parser.parse_args()
    batch = options.batch or options.gpus
    config = LaunchConfig(
        model=options.model,
        gpus=options.gpus,
        device=options.device,
        load_format=options.load_format,
        placement=options.placement,
        spares=options.spares,
        transport=options.transport,
        peer_memory=options.peer_memory,
        max_num_seqs=max(16, -(-batch // options.gpus)),
        max_model_len=PROMPT_TOKENS + options.tokens + 1,
        route="waterfill",
    )
    started = start_workers(config, lambda stage, done, total: None)
    balancer = Restless(started.group.ranks, started.group.placement, config.num_free_slots)
    balancer.skew = options.skew
    limits = SchedulerConfig(
        max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
    )
    engine = Engine(started.model, started.group, limits, balancer=balancer)
    engine.start()
    settle_objects()
    experts_per_token = read_config(find_model(options.model)).num_experts_per_tok
    workload = Workload.of(engine, batch, options.tokens, experts_per_token)
    common = {"model": options.model, "ranks": options.gpus, "summary": started.summary}
    rows = []
    try:
        for budget in options.bytes_per_step:
            measured = measure(engine, balancer, workload, options.steps, budget)
            rows.append(common | measured)
            print({name: value for name, value in rows[-1].items() if name != "summary"})
    finally:
        engine.close()
    card = None
    if options.device == "cuda":
        card = f"{options.gpus}x {read_driver().gpus[0].name}"
    asked = [one for one in (options.transport, options.peer_memory) if one != "auto"]
    name = "-".join(["migration", options.model, *asked])
    protocol.write(name, rows, gpu=card, measured_commit=options.commit)


def measure(
    engine: Engine,
    balancer: Restless,
    workload: Workload,
    num_steps: int,
    bytes_per_step: int,
) -> dict[str, Any]:
    """In turn quiet and moving, until each has been seen for `num_steps`."""
    balancer.bytes_per_step = bytes_per_step
    balancer.is_moving = False
    wanted = run(engine, balancer, workload, Samples())  # also records graphs
    balancer.is_moving = True
    are_equal = run(engine, balancer, workload, Samples()) == wanted
    balancer.moved_bytes = balancer.num_moved = 0
    balancer.waited_seconds = 0.0
    samples = {False: Samples(), True: Samples()}
    while min(len(one.steps) for one in samples.values()) < num_steps:
        for is_moving, kept in samples.items():
            balancer.is_moving = is_moving
            are_equal &= run(engine, balancer, workload, kept) == wanted
    balancer.is_moving = False
    row = {
        "batch": len(workload.prompts),
        "bytes_per_step": bytes_per_step,
        "skew": balancer.skew,
        **samples[False].row("quiet"),
        **samples[True].row("moving"),
        "moved_bytes": balancer.moved_bytes,
        "moved_experts": balancer.num_moved,
        "waited_seconds": balancer.waited_seconds,
        "tokens_equal": are_equal,
    }
    for what in ("step", "inter_token"):
        for percentile in ("p50", "p99"):
            ratio = row[f"moving_{what}_ms"][percentile] / row[f"quiet_{what}_ms"][percentile]
            row[f"{what}_{percentile}_ratio"] = ratio
    return row


def run(
    engine: Engine, balancer: Restless, workload: Workload, samples: Samples
) -> list[list[int]]:
    """All prompts at once; the tokens, and what was timed while all of them were being decoded."""
    params = SamplingParams(temperature=0.0, max_tokens=workload.num_tokens, ignore_eos=True)
    answers = [Answer() for _ in workload.prompts]
    balancer.steps = []
    for place, (prompt, answer) in enumerate(zip(workload.prompts, answers, strict=True)):
        request = Request(request_id=str(place), prompt_token_ids=prompt, params=params)
        engine.submit(request, answer)
    for answer in answers:
        answer.ended.wait()
        if answer.output is not None and answer.output.error is not None:
            raise answer.output.error
    steps, counted = balancer.steps, workload.pairs_per_step
    samples.steps += [
        then - now
        for (now, before), (then, pairs) in zip(steps, steps[1:], strict=False)
        if before == pairs == counted
    ]
    all_began = max(answer.times[0] for answer in answers)
    for answer in answers:
        pairs = zip(answer.times, answer.times[1:], strict=False)
        samples.between += [then - now for now, then in pairs if now >= all_began]
    return [answer.tokens for answer in answers]


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and most."""
    p50, p99 = np.percentile(samples, [50, 99])
    return {
        "p50": float(p50),
        "p99": float(p99),
        "max": max(samples),
        "num_samples": len(samples),
    }


if __name__ == "__main__":
    main()
