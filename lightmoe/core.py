"""The nouns that several rooms share. Plain data: no torch, no sockets, no clocks.

Shapes: T tokens on this rank, E experts, K experts per token, L layers that have experts.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Literal

import numpy as np

from lightmoe.errors import LightMoEError, RequestError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
MAX_CHOICES = 16
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Names and defaults are vLLM's.

    | field | meaning |
    |---|---|
    | temperature | 0 is greedy; otherwise logits are divided by it |
    | top_p, top_k, min_p | keep the nucleus, the k best (0: all), those above min_p x the best |
    | max_tokens | None: as many as fit into the context |
    | logprobs | also report that many most likely tokens a step (0: the chosen one's only) |
    | stop, stop_token_ids | end before one of these texts / after one of these tokens |
    | seed | the same seed, prompt and model give the same tokens, alone or in any batch |
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_integers()
        self._check_reals()
        self._check_stops()

    def _check_integers(self) -> None:
        bounds: dict[str, tuple[int, int]] = {
            "n": (1, MAX_CHOICES),
            "top_k": (-1, 2**31 - 1),
            "max_tokens": (1, 2**31 - 1),
            "min_tokens": (0, 2**31 - 1),
            "seed": (-(2**63), 2**63 - 1),
            "logprobs": (0, MAX_LOGPROBS),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "seed", "logprobs"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise RequestError(
                    f"{name} is {value!r}; give an integer from {low} to {high}", name
                )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})",
                "min_tokens",
            )

    def _check_reals(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "temperature": (0.0, 2.0),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "presence_penalty": (-2.0, 2.0),
            "frequency_penalty": (-2.0, 2.0),
            "repetition_penalty": (0.0, 10.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            number = not isinstance(value, bool) and isinstance(value, (int, float))
            if not number or not math.isfinite(value) or not low <= value <= high:
                raise RequestError(f"{name} is {value!r}; give a number from {low} to {high}", name)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0.0:
                raise RequestError(f"{name} is 0; give a number above 0", name)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are taken", "stop"
            )
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise RequestError(
                    f"a stop string needs 1 to {MAX_STOP_LENGTH} characters, not {text!r:.40}",
                    "stop",
                )
        if len(self.stop_token_ids) > 128:
            raise RequestError("stop_token_ids takes at most 128 ids", "stop_token_ids")
        for token in self.stop_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise RequestError(
                    f"stop_token_ids has {token!r}; give token ids", "stop_token_ids"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to continue. A client's `n` choices are n requests."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token that a rank chose, its log-probability, and the most likely others with theirs."""

    sequence_id: int
    token_id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step added to a request; `finish_reason` is set on its last output.

    `moved_pairs` (position, number), of tokens run since the last output: pairs that an
    OverflowRule redirected or dropped. Where a position comes again, it was run again.
    """

    request_id: str
    tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    error: LightMoEError | None = None
    moved_pairs: tuple[tuple[int, int], ...] = ()


OutputCallback = Callable[[RequestOutput], None]
"""Called on the engine's thread; must not block."""


@dataclass(frozen=True, slots=True)
class SamplingStep:
    """What the sampler needs to choose one token of one sequence.

    `position` (tokens chosen so far) and `seed` give the random number, so the choice does not
    depend on the batch. `history` holds prompt + output ids only where a penalty is set;
    `num_prompt_tokens` of them are the prompt. `banned_ids` may not be chosen (min_tokens).
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    position: int
    num_logprobs: int = -1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    num_prompt_tokens: int = 0
    history: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()


UNKNOWN_TOKEN = -1
"""In a plan: the token that the sequence gets in the step before, which its rank alone knows."""


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """One sequence's part of a step: run `token_ids` at positions start, start + 1, ...

    The last of them may be UNKNOWN_TOKEN, where the plan was made ahead of the step before's end.
    `block_table` lists the KV blocks that hold positions 0 .. start + len(token_ids) - 1.
    `sampling` is None while the prompt is not finished.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    sampling: SamplingStep | None = None


@dataclass(frozen=True, slots=True)
class SlotChange:
    """From an epoch on, that rank has that expert in that slot; slot -1: it has it no more.

    `is_home` makes this copy the expert's first.
    """

    layer: int
    expert: int
    rank: int
    slot: int
    is_home: bool = False


ROUTES = ("waterfill", "even", "none")
"""How a step's tokens are split over the copies of an expert."""

HOST_COPY = -1
"""As a Piece's source: the node's copy in host memory."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes begin .. end of one expert's blob, on their way into a slot that no step reads.

    `transfer` numbers the expert's whole way; its pieces come in order, the last one says so.
    """

    transfer: int
    layer: int
    expert: int
    source_rank: int
    source_slot: int
    target_rank: int
    target_slot: int
    begin: int
    end: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class Orders:
    """What all ranks do at the begin of a step, the same on each: first the changes.

    `epoch` numbers the placement after the changes; without any it is that of the step before.
    """

    epoch: int
    changes: tuple[SlotChange, ...] = ()
    pieces: tuple[Piece, ...] = ()
    route: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank does in one step. Ranks with no sequences still take part, with zero rows."""

    step: int
    tokens_per_rank: tuple[int, ...]
    sequences: tuple[SequenceStep, ...] = ()
    orders: Orders | None = None


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What a rank says of migrations: transfers whose last byte is in its slot since last asked.

    `waited_seconds` is what its step waited for pieces; `error` why a transfer cannot go on.
    """

    transfers: tuple[int, ...] = ()
    waited_seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class OverflowRule:
    """Pairs by which a rank passes `capacity_factor` x the mean load are redirected or dropped."""

    mode: Literal["redirect", "drop"]
    capacity_factor: float

    def __str__(self) -> str:
        return f"{self.mode} over {self.capacity_factor:g} x the mean load"


@dataclass(frozen=True, slots=True)
class StepOverflow:
    """What an OverflowRule did in one step, on one rank.

    `moved_pairs` int32 [T]: how many pairs of each of its own tokens did not go where the gate had
    chosen, over all layers. `num_layers` counts the layers in which a rank passed its capacity,
    `num_left` the pairs above it that nothing could be done about; both the same on all ranks.
    """

    moved_pairs: np.ndarray
    num_layers: int
    num_left: int


@dataclass(frozen=True, slots=True)
class OverflowReport:
    """What an OverflowRule has done since the start: as StepOverflow, of all ranks and steps."""

    rule: OverflowRule
    num_moved_pairs: int = 0
    num_layers: int = 0
    num_left: int = 0

    def plus(self, steps: Sequence[StepOverflow]) -> OverflowReport:
        """With what all ranks said of one more step."""
        moved = sum(int(step.moved_pairs.sum()) for step in steps)
        layers, left = steps[0].num_layers, steps[0].num_left
        return OverflowReport(
            self.rule, self.num_moved_pairs + moved, self.num_layers + layers, self.num_left + left
        )


@dataclass(frozen=True, slots=True)
class HostTierCounts:
    """Of experts that layers needed, where a rank's slots do not suffice for all of its experts.

    An expert counts once a layer and step: a hit was in its slot when its layer began,
    `num_prefetched` of the hits since they were fetched ahead of a first use; for a miss the
    step waited, `waited_seconds` in all. `fetched_bytes` came from the host, guesses included.
    """

    num_hits: int = 0
    num_misses: int = 0
    num_prefetched: int = 0
    fetched_bytes: int = 0
    waited_seconds: float = 0.0

    def __add__(self, other: HostTierCounts) -> HostTierCounts:
        """The counts of both."""
        return HostTierCounts(*map(operator.add, astuple(self), astuple(other)))

    @property
    def hit_rate(self) -> float:
        """Hits among what was needed; 1 where nothing was."""
        needed = self.num_hits + self.num_misses
        return self.num_hits / needed if needed else 1.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one rank returns from one step.

    `expert_tokens` [L, E] counts the (token, expert) pairs of this rank's own tokens;
    `layer_pairs` [L] counts the pairs that this rank's slots computed, for all ranks' tokens;
    `routing` uint16 [T, L, K] has the experts of its own tokens where they are recorded;
    `overflow` what an OverflowRule did, and `host_tier` what the host tier did, where there is one.
    """

    rank: int
    step: int
    tokens: tuple[SampledToken, ...]
    expert_tokens: np.ndarray
    layer_pairs: np.ndarray
    seconds: float = 0.0
    arrivals: Arrivals | None = None
    routing: np.ndarray | None = None
    overflow: StepOverflow | None = None
    host_tier: HostTierCounts | None = None


@dataclass(frozen=True, slots=True)
class RankInfo:
    """What one rank says of itself once its weights are loaded. Sizes in bytes.

    `num_slots` counts free ones too; `expert_bytes` is what one slot holds,
    `overlap` how communication is hidden, and why so.
    """

    rank: int
    kind: Literal["home", "spare"]
    device: str
    num_slots: int
    weight_bytes: int
    num_kv_blocks: int
    pid: int = 0
    expert_bytes: int = 0
    overlap: str = ""


@dataclass(frozen=True, slots=True)
class BalanceEvent:
    """One line of what the balancer did, and the epoch at which it said so."""

    epoch: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceReport:
    """How the balancer is. `error` says why it has died; events are the last ones, oldest first.

    `num_migrations` counts placements reached, `num_events` all events since the start.
    """

    num_migrations: int
    num_moved_experts: int
    moved_bytes: int
    waited_seconds: float
    heartbeat_age_seconds: float
    error: str | None
    events: tuple[BalanceEvent, ...]
    num_events: int


@dataclass(slots=True)
class LoadReport:
    """Expert load since the start, for `/v1/experts/load`, the page and the heatmap.

    `expert_tokens` [L, E], `rank_pairs` [W, L]; `placement[layer][expert]` lists the ranks that
    hold a slot of that expert, home first. `rank_seconds` [W] is each rank's time in
    steps, its waits for the others included.
    """

    expert_tokens: np.ndarray
    rank_pairs: np.ndarray
    rank_kinds: list[str]
    placement: list[list[list[int]]]
    epoch: int = 0
    num_steps: int = 0
    rank_seconds: list[float] = field(default_factory=list)
    route: str = ""
    balance: BalanceReport | None = None
    overflow: OverflowReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What clients and the front need to know of the served model.

    `num_layers` counts the layers that have experts. `generation_defaults` are the
    sampling fields of generation_config.json (temperature, top_p, top_k, ...) that hold where a
    request says nothing. `routing_skew` says that the experts are not those that the gate chose,
    `overflow` that some may not be.
    """

    name: str
    folder: str
    architecture: str
    num_layers: int
    num_experts: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    generation_defaults: dict[str, float]
    dummy_weights: bool = False
    routing_skew: str | None = None
    overflow: OverflowRule | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStats:
    """One rank at this moment: sequences that run on it and the share of its KV blocks in use."""

    rank: int
    kind: Literal["home", "spare"]
    num_running: int
    num_waiting: int
    kv_usage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the start, and what runs at this moment.

    `host_tier` adds up all ranks; None where every expert has a slot.
    """

    num_steps: int
    num_running: int
    num_waiting: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_finished: int
    num_preemptions: int
    uptime_seconds: float
    last_step_seconds: float
    ranks: tuple[RankStats, ...]
    host_tier: HostTierCounts | None = None
