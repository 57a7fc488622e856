"""The loop: schedule every rank, run one step on all of them, hand the tokens out.

It knows token ids only, no text, no HTTP, no Ray, no CUDA.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from lightmoe.core import (
    ROUTES,
    BalanceReport,
    Batch,
    EngineStats,
    HostTierCounts,
    LoadReport,
    ModelInfo,
    Orders,
    OutputCallback,
    OverflowReport,
    RankStats,
    Request,
    RequestOutput,
    SampledToken,
    SequenceStep,
    StepResult,
)
from lightmoe.engine.balance import RoutingRecorder, StepBalancer
from lightmoe.engine.kv_blocks import KVBlocks
from lightmoe.engine.router import Router
from lightmoe.engine.scheduler import Scheduler
from lightmoe.engine.sequence import Sequence
from lightmoe.engine.worker_group import WorkerGroup
from lightmoe.errors import (
    LightMoEError,
    QueueFullError,
    RankError,
    RequestError,
    ShuttingDownError,
)
from lightmoe.moe.placement import Placement

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 1.0
"""How often an idle engine looks whether its ranks still live."""
_STOP_SECONDS = 0.5
"""How long a step may go on after the end was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits per rank and step, and of the whole queue."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_queued_reqs: int = 1024


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A step that has begun: what each rank runs, in which placement, and since when."""

    plans: list[tuple[SequenceStep, ...]]
    placement: Placement
    begun: float


class Engine:
    """Runs requests on the ranks of a WorkerGroup, on a thread of its own once started.

    `draining` says that it takes no more requests, `error` why it has ended, `failure` the same if
    it was not asked to.
    """

    def __init__(
        self,
        model: ModelInfo,
        workers: WorkerGroup,
        config: SchedulerConfig,
        *,
        route: str = "waterfill",
        balancer: StepBalancer | None = None,
        recorder: RoutingRecorder | None = None,
    ) -> None:
        self.model = model
        self.error: LightMoEError | None = None
        self.failure: LightMoEError | None = None
        self._on_failure: Callable[[LightMoEError], None] = lambda error: None
        self._workers = workers
        self._config = config
        self._balancer = balancer
        self._recorder = recorder
        self._route = route
        self._wanted_route = route
        self._schedulers = [
            Scheduler(
                KVBlocks(rank.num_kv_blocks, workers.block_size),
                config.max_num_seqs,
                config.max_num_batched_tokens,
            )
            for rank in workers.ranks
        ]
        self._router = Router(len(workers.ranks))
        self._sequences: dict[int, Sequence] = {}
        self._ids: dict[str, int] = {}
        self._next_id = 0
        self._num_finished = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_steps = 0
        self._num_begun = 0
        self._under_way: deque[_UnderWay] = deque()
        self._last_end = 0.0
        self._last_step_seconds = 0.0
        self._started = time.monotonic()
        self._expert_tokens = np.zeros((model.num_layers, model.num_experts), dtype=np.int64)
        self._rank_pairs = np.zeros((len(workers.ranks), model.num_layers), dtype=np.int64)
        self._rank_seconds = [0.0] * len(workers.ranks)
        self._host_tier: HostTierCounts | None = None
        self._overflow = None if model.overflow is None else OverflowReport(model.overflow)
        self._new: deque[tuple[Request, OutputCallback]] = deque()
        self._aborted: deque[str] = deque()
        self._wake = threading.Condition()
        self.draining = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lightmoe-engine", daemon=True)

    # Any thread.

    @property
    def max_num_queued_reqs(self) -> int:
        """Requests that may run and wait together."""
        return self._config.max_num_queued_reqs

    def start(self) -> None:
        """Begin to run steps."""
        self._thread.start()

    def submit(self, request: Request, on_output: OutputCallback) -> None:
        """Queue a request; `on_output` is called on the engine's thread.

        Raises RequestError for a prompt that cannot run, QueueFullError, ShuttingDownError, and
        the RankError that ended the engine.
        """
        self._check(request)
        with self._wake:
            if self.error is not None:
                raise self.error
            queued = (other.request_id for other, _ in self._new)
            if request.request_id in self._ids or request.request_id in queued:
                raise RequestError(f"request id {request.request_id!r} is running already")
            if self.draining:
                raise ShuttingDownError(
                    "the server is shutting down; send the request to another one"
                )
            if len(self._new) + len(self._sequences) >= self._config.max_num_queued_reqs:
                raise QueueFullError(
                    f"{self._config.max_num_queued_reqs} requests are queued; try again later"
                )
            self._new.append((request, on_output))
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """End a request early; unknown and finished ids are ignored."""
        with self._wake:
            self._aborted.append(request_id)
            self._wake.notify()

    def balance(self) -> BalanceReport | None:
        """How the balancer is; None where there is none."""
        return None if self._balancer is None else self._balancer.report()

    def set_route(self, route: str) -> None:
        """Route by "waterfill", "even" or "none" from the next step on, on all ranks."""
        if route not in ROUTES:
            known = ", ".join(ROUTES)
            raise RequestError(f"route is {route!r:.100}; give one of: {known}", "route")
        self._wanted_route = route

    def load(self) -> LoadReport:
        """Expert load since the start."""
        placement = self._workers.placement
        balance = self.balance()
        with self._wake:
            return LoadReport(
                expert_tokens=self._expert_tokens.copy(),
                rank_pairs=self._rank_pairs.copy(),
                rank_kinds=list(placement.rank_kinds),
                placement=[[list(ranks) for ranks in layer] for layer in placement.copies],
                epoch=placement.epoch,
                num_steps=self._num_steps,
                route=self._wanted_route,
                balance=balance,
                rank_seconds=self._rank_seconds.copy(),
                overflow=self._overflow,
            )

    def stats(self) -> EngineStats:
        """Counters since the start, and what runs now."""
        ranks = tuple(
            RankStats(
                rank=rank.rank,
                kind=rank.kind,
                num_running=len(scheduler.running),
                num_waiting=len(scheduler.waiting),
                kv_usage=scheduler.blocks.usage,
            )
            for rank, scheduler in zip(self._workers.ranks, self._schedulers, strict=True)
        )
        return EngineStats(
            num_steps=self._num_steps,
            num_running=sum(rank.num_running for rank in ranks),
            num_waiting=len(self._new) + sum(rank.num_waiting for rank in ranks),
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_finished=self._num_finished,
            num_preemptions=sum(scheduler.num_preemptions for scheduler in self._schedulers),
            uptime_seconds=time.monotonic() - self._started,
            last_step_seconds=self._last_step_seconds,
            ranks=ranks,
            host_tier=self._host_tier,
        )

    def on_failure(self, callback: Callable[[LightMoEError], None]) -> None:
        """Have `callback` called, on the engine's thread, if the engine dies."""
        self._on_failure = callback
        if self.failure is not None:
            callback(self.failure)

    def drain(self, seconds: float) -> None:
        """Refuse new requests, let running ones go on that long, then end them with an error."""
        with self._wake:
            self.draining = True
        deadline = time.monotonic() + seconds
        while (
            (self._sequences or self._new)
            and time.monotonic() < deadline
            and self._thread.is_alive()
        ):
            time.sleep(0.02)
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=_STOP_SECONDS)
        # A step that hangs must not keep those waiting who wait for it.
        self._fail_all(self.failure or ShuttingDownError("the engine has been shut down"))

    def close(self) -> None:
        """End everything and stop the ranks; may be called twice."""
        if not self._closing:
            self.drain(0.0)
        if self._balancer is not None:
            self._balancer.close()
        self._workers.close()
        if self._recorder is not None:
            self._recorder.close()

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._take_news()
                if self._sequences or self._under_way:
                    self.step()
            while self._under_way:  # ranks write their traces once nobody waits for them
                self._finish_step()
        except Exception as error:
            # Once the end was asked for, the ranks may be gone in the middle of a long step, and
            # before: where all processes of a service get the signal, they do, too.
            asked = self._closing or (self.draining and isinstance(error, RankError))
            if not asked:
                self.failure = _as_own_error(error)
            elif not self._closing:
                logger.info("a rank ended while the server was stopping: %s", error)
        if self.failure is not None:
            self._fail_all(self.failure)
            self._on_failure(self.failure)

    def _wait_for_work(self) -> bool:
        with self._wake:
            if self._wake.wait_for(self._has_news, _CHECK_SECONDS):
                return not self._closing
        self._workers.check()  # not under the lock: to find out who died may take seconds
        return True

    def _has_news(self) -> bool:
        return bool(
            self._closing or self._new or self._aborted or self._sequences or self._under_way
        )

    def _take_news(self) -> None:
        with self._wake:
            new, aborted = list(self._new), list(self._aborted)
            self._new.clear()
            self._aborted.clear()
            for request, on_output in new:
                self._admit(request, on_output)
            for request_id in aborted:
                sequence = self._sequences.get(self._ids.get(request_id, -1))
                if sequence is not None:
                    self._finish(sequence)
                    sequence.on_output(RequestOutput(request_id, finish_reason="abort"))

    def step(self) -> None:
        """Begin a step, then hand out the one before: the ranks never wait for the driver."""
        if not self._begin_step() or len(self._under_way) > 1:
            self._finish_step()

    def _begin_step(self) -> bool:
        """Schedule a step and start it; False where nothing can be planned yet."""
        if self._under_way and any(one.is_penalised for one in self._sequences.values()):
            return False  # what comes next depends on tokens that are being chosen
        plans = [scheduler.schedule() for scheduler in self._schedulers]
        tokens_per_rank = tuple(sum(len(part.token_ids) for part in plan) for plan in plans)
        if self._under_way and not any(tokens_per_rank):
            return False
        orders, placement = self._orders()
        if orders is not None:
            self._route = orders.route or self._route
        self._workers.begin(
            [Batch(self._num_begun, tokens_per_rank, plan, orders) for plan in plans]
        )
        self._num_begun += 1
        self._under_way.append(_UnderWay(plans, placement, time.perf_counter()))
        return True

    def _finish_step(self) -> None:
        """Wait for the first step under way and hand out its tokens."""
        results = self._workers.finish()
        step, now = self._under_way.popleft(), time.perf_counter()
        self._last_step_seconds = now - max(step.begun, self._last_end)
        self._last_end = now
        # The ranks have done it: what is theirs is now the driver's.
        self._workers.placement = step.placement
        self._observe(results)
        with self._wake:
            if self.error is not None:
                return  # given up by drain() while the ranks were busy
            self._audit(step.plans, results)
            for result in results:
                self._count(result)
                for token in result.tokens:
                    self._append(token)
            self._num_steps += 1

    def _orders(self) -> tuple[Orders | None, Placement]:
        """What the balancer wants of the next step, with the route if it was changed.

        And the placement in which the step runs.
        """
        wanted = self._wanted_route
        orders, placement = None, self._workers.placement
        if self._under_way:  # in the one that the last step leaves
            placement = self._under_way[-1].placement
        if self._balancer is not None:
            orders, placement = self._balancer.orders(placement, wanted) or (None, placement)
        if wanted != self._route:
            orders = replace(orders or Orders(placement.epoch), route=wanted)
        return orders, placement

    def _observe(self, results: list[StepResult]) -> None:
        if self._balancer is not None:
            tokens = np.stack([result.expert_tokens for result in results])
            self._balancer.observe(tokens.sum(axis=0, dtype=np.int64), results)
        if self._recorder is not None:
            self._recorder.add(results)

    def _count(self, result: StepResult) -> None:
        self._expert_tokens += result.expert_tokens
        self._rank_pairs[result.rank] += result.layer_pairs
        self._rank_seconds[result.rank] += result.seconds
        if result.host_tier is not None:
            self._host_tier = (self._host_tier or HostTierCounts()) + result.host_tier

    def _audit(self, plans: list[tuple[SequenceStep, ...]], results: list[StepResult]) -> None:
        """What an OverflowRule did, in all and to each token of each sequence."""
        steps = [result.overflow for result in results if result.overflow is not None]
        if self._overflow is None or not steps:
            return
        self._overflow = self._overflow.plus(steps)
        for plan, step in zip(plans, steps, strict=True):
            moved = iter(step.moved_pairs.tolist())
            for part in plan:
                numbers = list(islice(moved, len(part.token_ids)))
                sequence = self._sequences.get(part.sequence_id)
                if sequence is not None:
                    sequence.note_moved(part.start, numbers)

    def _append(self, token: SampledToken) -> None:
        sequence = self._sequences.get(token.sequence_id)
        if sequence is None:
            return  # it has ended while this step was under way
        request_id = sequence.request.request_id
        if token.token_id < 0:
            self._finish(sequence)
            error = RequestError(
                "the model's logits are not finite; its weights or dtype are at fault"
            )
            sequence.on_output(RequestOutput(request_id, finish_reason="error", error=error))
            return
        reason = sequence.append(token.token_id)
        self._num_generated_tokens += 1
        if reason is not None:
            self._finish(sequence)
        moved = sequence.take_moved()
        sequence.on_output(RequestOutput(request_id, (token,), reason, moved_pairs=moved))

    def _check(self, request: Request) -> None:
        num_prompt, limit = len(request.prompt_token_ids), self.model.max_model_len
        if not num_prompt:
            raise RequestError("the prompt is empty; give at least one token", "prompt")
        wanted = request.params.max_tokens or 1
        if num_prompt + wanted > limit:
            raise RequestError(
                f"the prompt has {num_prompt} tokens and max_tokens is {wanted}, together over the"
                f" context of {limit}; shorten one of them",
                "max_tokens" if num_prompt < limit else "prompt",
            )
        vocab_size = self.model.vocab_size
        stop_token_ids = request.params.stop_token_ids
        for name, ids in (("prompt", request.prompt_token_ids), ("stop_token_ids", stop_token_ids)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise RequestError(f"token id {token} is not in 0 .. {vocab_size - 1}", name)

    def _admit(self, request: Request, on_output: OutputCallback) -> None:
        params = request.params
        eos = () if params.ignore_eos else self.model.eos_token_ids
        rank = self._router.choose(self._schedulers)
        sequence = Sequence(
            sequence_id=self._next_id,
            request=request,
            on_output=on_output,
            rank=rank,
            max_tokens=params.max_tokens
            or self.model.max_model_len - len(request.prompt_token_ids),
            stop_ids=frozenset((*eos, *params.stop_token_ids)),
            seed=random.getrandbits(62) if params.seed is None else params.seed,
            token_ids=list(request.prompt_token_ids),
        )
        self._next_id += 1
        self._sequences[sequence.sequence_id] = sequence
        self._ids[request.request_id] = sequence.sequence_id
        self._schedulers[rank].add(sequence)
        self._num_prompt_tokens += sequence.num_prompt_tokens

    def _finish(self, sequence: Sequence) -> None:
        self._schedulers[sequence.rank].remove(sequence)
        del self._sequences[sequence.sequence_id]
        del self._ids[sequence.request.request_id]
        self._num_finished += 1

    def _fail_all(self, error: LightMoEError) -> None:
        with self._wake:
            self.error = self.error or error
            waiting = list(self._new)
            self._new.clear()
            for sequence in list(self._sequences.values()):
                self._finish(sequence)
                waiting.append((sequence.request, sequence.on_output))
        for request, on_output in waiting:
            on_output(RequestOutput(request.request_id, finish_reason="error", error=error))


def _as_own_error(error: Exception) -> LightMoEError:
    if isinstance(error, LightMoEError):
        return error
    logger.error("the engine stopped", exc_info=error)
    return RankError(f"the engine stopped: {type(error).__name__}: {error}")
