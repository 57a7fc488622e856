"""Which transport carries the rows: exchanges predicted from a topology's figures.

A MoE layer has three exchanges: who chose what, rows out, results back. Each costs what starting it
takes, and its bytes at the slowest hop of the topology. What no topology file says is here, with
where it comes from. Tokens choose evenly, and every expert has one copy.

Shapes: W ranks, T tokens of a rank, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightmoe.moe.overlap_model import FEWEST_TOKENS
from lightmoe.topology import Topology
from lightmoe.topology.tree import Hop

Transport = Literal["gloo", "nccl", "copy_engine"]
Road = Literal["", "ipc", "host"]
"""Where copy_engine's ranks meet: on the cards, or in the host's memory."""

START_SECONDS: dict[Transport, float] = {"gloo": 50e-6, "nccl": 100e-6, "copy_engine": 25e-6}
"""Of one exchange beside its bytes. copy_engine: its kernels address the other card, so no copy's
latency comes on top; three of them take 30 to 47 us in a decode step's graph over NVLink, and are
not measured over PCIe. nccl: what is left of 1.5 ms for few tokens
(benchmarks/results/exchange-4x-nvidia-h200-2026-11-21.json)."""

HOST_SECONDS = 1.2e-3
"""What nccl pays a layer because the host reads the counts and writes the receipts (`route_ms` of
the same file, on a host whose cores do nothing else)."""

NCCL_HOST_SHARE = 0.62
"""What NCCL reaches of the copies' bandwidth through the host's memory: 7.5 to 7.8 GB/s of 12 to
12.5 between two RTX 2080 Ti (the sources in topology/10x2080ti-pcie.toml)."""

HIDDEN_SHARE = 0.45
"""What copy_engine hides of a larger step's exchange behind the experts, where that pays: 4.4 of
9.6 ms (benchmarks/results/moe-layer-ep-host-4x-nvidia-h200-2026-11-21.json); later, on two cards,
whose exchange is half as long as computing, 3.2 of 4.9. nccl waits for the host and hides
nothing."""

REQUEST_TOKENS = 1024, 256
"""Prompt and answer of the request by which a server is judged whose phases want different ways."""

CHOICE_BYTES = 2
"""An expert's number on the wire."""


@dataclass(frozen=True, slots=True)
class Way:
    """A transport, and where its ranks meet if that is a question."""

    transport: Transport
    road: Road = ""

    @property
    def label(self) -> str:
        """For the launch line."""
        return f"{self.transport} ({self.road})" if self.road else self.transport


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeShape:
    """Sizes of one MoE layer's exchange."""

    num_experts: int
    num_experts_per_token: int
    width: int
    element_bytes: int


@dataclass(frozen=True, slots=True)
class ExchangeTimes:
    """Predicted seconds of one layer's exchanges, each alone."""

    choice: float
    dispatch: float
    combine: float

    @property
    def total(self) -> float:
        """All three."""
        return self.choice + self.dispatch + self.combine


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of one layer's exchanges by one way: of a prefill step and of a decode step."""

    way: Way
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class TransportChoice:
    """The way taken, why in one line, and the numbers of all that were compared."""

    way: Way
    reason: str
    predictions: tuple[Prediction, ...]


def exchange_matrices(
    shape: ExchangeShape, tokens: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expected bytes [W, W] of a layer's choice, rows and results, given each rank's tokens [W].

    A token's row goes to each other rank that holds one of its experts, with probability
    1 - C(E - E/W, K) / C(E, K); its K results come back.
    """
    num_experts, num_ranks = shape.num_experts, len(tokens)
    here = num_experts / num_ranks
    missed = math.prod(
        max(0.0, num_experts - here - k) / (num_experts - k)
        for k in range(shape.num_experts_per_token)
    )
    sent = np.repeat(np.array(tokens, dtype=float)[:, None], num_ranks, axis=1)
    np.fill_diagonal(sent, 0)
    row_bytes = shape.width * shape.element_bytes
    choice = sent * shape.num_experts_per_token * CHOICE_BYTES
    rows = sent * (1 - missed) * row_bytes
    results = sent.T * shape.num_experts_per_token / num_ranks * row_bytes
    return choice, rows, results


def predict(
    topology: Topology, way: Way, shape: ExchangeShape, tokens: Sequence[float]
) -> ExchangeTimes:
    """The times of one layer's exchanges by this way, for each rank's tokens [W]."""
    choice, rows, results = exchange_matrices(shape, tokens)
    if len(tokens) < 2 or not choice.any():
        return ExchangeTimes(0.0, 0.0, 0.0)
    start = START_SECONDS[way.transport]
    if way.transport == "copy_engine" and way.road == "host":
        row_bytes = shape.width * shape.element_bytes
        computed = sum(tokens) * shape.num_experts_per_token / len(tokens)
        return ExchangeTimes(
            start + _pulled_seconds(topology, choice),
            start
            + _upload_seconds(topology, [num * row_bytes for num in tokens])
            + _pulled_seconds(topology, rows),
            start
            + _upload_seconds(topology, [computed * row_bytes] * len(tokens))
            + _pulled_seconds(topology, results),
        )
    if way.transport == "copy_engine":
        seconds = [_bytes_seconds(topology, matrix) for matrix in (choice, rows, results)]
    else:
        share = _nccl_share(topology) if way.transport == "nccl" else np.ones_like(choice)
        parts = [(matrix / share).tolist() for matrix in (choice, rows, results)]
        seconds = [topology.all_to_all_seconds(part) for part in parts]
    for_the_host = HOST_SECONDS if way.transport == "nccl" else 0.0
    return ExchangeTimes(start + for_the_host + seconds[0], start + seconds[1], start + seconds[2])


def choose_transport(
    topology: Topology,
    ways: Sequence[Way],
    shape: ExchangeShape,
    *,
    prefill_tokens: int,
    decode_tokens: int,
) -> TransportChoice:
    """The way with the least time in the exchange, for steps of so many tokens on every rank.

    One server has one transport. Where a prefill step would take another way than a decode step,
    that with the least time over a request of `REQUEST_TOKENS` is taken. Ties go to the first.
    """
    ranks = range(topology.num_ranks)
    found = tuple(
        Prediction(
            way,
            predict(topology, way, shape, [prefill_tokens for _ in ranks]).total,
            predict(topology, way, shape, [decode_tokens for _ in ranks]).total,
        )
        for way in ways
    )

    def exposed(one: Prediction) -> float:
        hides = one.way.transport == "copy_engine" and prefill_tokens >= 2 * FEWEST_TOKENS
        return one.prefill_seconds * (1 - HIDDEN_SHARE if hides else 1.0)

    def of_request(one: Prediction) -> float:
        prompt, answer = REQUEST_TOKENS
        return prompt / prefill_tokens * exposed(one) + answer / decode_tokens * one.decode_seconds

    prefill, decode = min(found, key=exposed), min(found, key=lambda one: one.decode_seconds)
    chosen = prefill if prefill is decode else min(found, key=of_request)
    reason = _numbers(topology, found, prefill_tokens, decode_tokens)
    if prefill is not decode:
        prompt, answer = REQUEST_TOKENS
        reason += (
            f"; prompts alone would take {prefill.way.label}, answers {decode.way.label}: taken is"
            f" the least over {prompt} + {answer} tokens"
        )
    return TransportChoice(chosen.way, reason, found)


def ways_on(topology: Topology) -> tuple[Way, ...]:
    """The ways that a server could take on the described machine, the first where nothing tells
    them apart; none for one rank."""
    num_ranks = topology.num_ranks
    if num_ranks == 1:
        return ()
    if any(topology.device(rank).kind == "cpu" for rank in range(num_ranks)):
        return (Way("gloo"),)
    ways = (Way("copy_engine", "host"), Way("nccl"))
    return (Way("copy_engine", "ipc"), *ways) if all_reach(topology) else ways


def all_reach(topology: Topology) -> bool:
    """Whether every card of the description can address every other's memory."""
    ranks = range(topology.num_ranks)
    return all(topology.has_p2p(s, t) for s in ranks for t in ranks if s != t)


def _numbers(
    topology: Topology, found: Sequence[Prediction], prefill_tokens: int, decode_tokens: int
) -> str:
    times = ", ".join(
        f"{one.way.label} {one.prefill_seconds * 1e3:.2f} / {one.decode_seconds * 1e3:.2f} ms"
        for one in found
    )
    return (
        f"a layer's exchange by {topology.name}, {prefill_tokens} / {decode_tokens} tokens a rank:"
        f" {times}"
    )


def _bytes_seconds(topology: Topology, matrix: np.ndarray) -> float:
    return topology.busiest_seconds(topology.link_bytes(matrix.tolist()))


def _nccl_share(topology: Topology) -> np.ndarray:
    """[W, W] of the bandwidth that the topology says."""
    ranks = range(topology.num_ranks)
    return np.array(
        [[1.0 if topology.has_p2p(s, t) else NCCL_HOST_SHARE for t in ranks] for s in ranks]
    )


def _upload_seconds(topology: Topology, num_bytes: Sequence[float]) -> float:
    """Every rank's bytes [W] into the host memory of its socket, by its copy engine."""
    load: dict[Hop, float] = defaultdict(float)
    for rank, size in enumerate(num_bytes):
        for hop in topology.host_path(rank, "up"):
            load[hop] += size
    ranks = range(topology.num_ranks)
    latency = max(topology.links[topology.ranks[rank].link].latency_seconds for rank in ranks)
    return topology.busiest_seconds(load) + latency


def _pulled_seconds(topology: Topology, matrix: np.ndarray) -> float:
    """Bytes [W, W] from the host memory of the source's socket to the rank that wants them."""
    load: dict[Hop, float] = defaultdict(float)
    for source, target in np.argwhere(matrix).tolist():
        for hop in topology.pull_path(source, target):
            load[hop] += float(matrix[source, target])
    return topology.busiest_seconds(load)
