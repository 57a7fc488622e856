"""Whether and how a rank's layers overlap: its stages are timed once, at the start, on all ranks.

Every rank reckons with the times of the slowest, so all come to the same answer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from lightmoe import kernels
from lightmoe.distributed.peers import gather_bytes
from lightmoe.models.decoder import Decoder
from lightmoe.moe.dispatch import CopyEngineDispatcher, ExpertGroup
from lightmoe.moe.dispatch.peer_lane import PeerLane
from lightmoe.moe.layer import MoELayer
from lightmoe.moe.multiprocessors import overlap_beside
from lightmoe.moe.overlap_model import (
    FEWEST_TOKENS,
    MARGIN,
    LayerCosts,
    Overlap,
    choose_chunks,
    fit,
    pipeline_seconds,
)
from lightmoe.moe.pipeline import run_layer

HALVES_MARGIN = 0.15
"""Two halves must be predicted to save this share of the time in turn: products of half the rows
are slower, all the more on a card at the limit of its power, and a step with a prompt on few ranks
has less to hide than these times say. Where 8 and 10 % were predicted, qwen3-30b-a3b on two H200
and mixtral-8x7b on four, whole prefill steps took 5 and 4 % longer; where 25 % were, mixtral-8x7b
on two without peer-to-peer, 12 % less. Chunks are wrong alike: of both the faster is taken."""

_NUM_SAMPLES = 5
_HOST_CHUNKS, _HOST_WARM_UPS = (1, 4), 4


@dataclass(frozen=True, slots=True)
class Stages:
    """Fitted costs of one layer's stages: alone, beside another half's, beside other chunks'."""

    alone: LayerCosts
    beside: LayerCosts
    chunked: LayerCosts


def choose_overlap(
    decoder: Decoder,
    group: ExpertGroup,
    max_tokens: int,
    wanted: Literal["auto", "off", "halves"],
    *,
    is_recorded: bool = False,
) -> tuple[Overlap, str]:
    """How the layers of this rank overlap, and why in one line; the same on every rank."""
    if group.communicator is None:
        return Overlap(), ""
    if is_recorded:
        return Overlap(), "no overlap: a record of the routing takes each layer's tokens at once"
    if wanted == "off":
        return Overlap(), "no overlap, as asked"
    lane, control = group.peers, group.communicator
    if wanted == "halves":
        device = decoder.moe_layers[0].gate.router_weight.device
        road = lane.memory.road if lane else "ipc"
        return replace(overlap_beside(device, road), halves_from=2), "two halves, as asked"
    if lane is None or control is None:
        return Overlap(), "no overlap: this transport waits for the host"
    if max_tokens < 2 * FEWEST_TOKENS:
        return Overlap(), f"no overlap: steps have up to {max_tokens} tokens a rank"
    cut = overlap_beside(lane.rows.device, lane.memory.road)
    return decide(_time_stages(decoder, group, lane, max_tokens, cut), max_tokens, cut)


@dataclass(frozen=True, slots=True)
class Predicted:
    """Seconds of a layer with what is between it and the next one, behind which halves hide too:
    in turn, in so many chunks (1: they would save nothing), in halves."""

    in_turn: float
    chunked: float
    num_chunks: int
    halves: float

    @classmethod
    def of(cls, stages: Stages, num_tokens: int) -> Predicted:
        """For so many tokens a rank."""
        dense = _dense_seconds(stages, num_tokens)
        in_turn = pipeline_seconds(stages.alone, num_tokens, 1) + dense
        choice = choose_chunks(stages.chunked, num_tokens)
        chunked, halves = choice.predicted_seconds + dense, _halves_seconds(stages, num_tokens)
        return cls(in_turn, chunked, choice.num_chunks, halves)

    @property
    def chunks_pay(self) -> bool:
        """Whether chunks save enough of the time in turn."""
        return self.num_chunks > 1 and self.chunked < (1 - MARGIN) * self.in_turn

    @property
    def halves_pay(self) -> bool:
        """Whether halves do, and save more than chunks."""
        return self.halves < min((1 - HALVES_MARGIN) * self.in_turn, self.chunked)

    def __str__(self) -> str:
        """For the launch line."""
        chunked = f"{_ms(self.chunked)} in {self.num_chunks} chunks"
        return (
            f"{_ms(self.in_turn)} a layer in turn,"
            f" {chunked if self.num_chunks > 1 else 'no less in chunks'},"
            f" {_ms(self.halves)} in halves"
        )


def decide(stages: Stages, max_tokens: int, cut: Overlap) -> tuple[Overlap, str]:
    """Two halves where they save time, else chunks of one layer, else neither.

    `cut` is how products share the device then.
    """
    whole = Predicted.of(stages, max_tokens)
    times = f"{max_tokens} tokens a rank: {whole}"
    if whole.halves_pay:
        sizes = [size for size in _doublings(max_tokens) if size >= FEWEST_TOKENS]
        begin = min(size for size in sizes if Predicted.of(stages, size).halves_pay)
        return replace(cut, halves_from=begin), f"two halves from {begin} tokens a rank ({times})"
    if whole.chunks_pay:
        return replace(cut, num_chunks=None, costs=stages.chunked), f"chunks ({times})"
    why = f"halves must save {HALVES_MARGIN:.0%}, chunks {MARGIN:.0%}"
    return Overlap(), f"no overlap ({times}; {why})"


def _dense_seconds(stages: Stages, num_tokens: int) -> float:
    """Time between two layers."""
    return 2 * stages.alone.between.seconds(num_tokens)


def _halves_seconds(stages: Stages, num_tokens: int) -> float:
    """Time of a layer in two halves, A and B: what computes, each with what is exchanged behind it.

    up A      | up B, down A | down B    | dense A   | dense B
    rows of B |              | results A | results B | rows of A of the next layer

    The gate's own product is left out: its time here is mostly the exchange of the choices.
    """
    costs, alone, half = stages.beside, stages.alone, num_tokens // 2
    dense, results = _dense_seconds(stages, half), costs.combine.seconds(half)
    rows = max(costs.gate.seconds(half), costs.upload.seconds(half)) + costs.dispatch.seconds(half)
    up, down = alone.up.seconds(half), alone.down.seconds(half)
    both = up + down if costs.in_turn else max(costs.up.seconds(half), costs.down.seconds(half))
    computing = max(up, rows) + both + max(down, results) + max(dense, results) + max(dense, rows)
    return max(computing, 2 * costs.host.seconds(1))


def _doublings(largest: int) -> list[int]:
    sizes = [largest]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes[::-1]


def _time_stages(
    decoder: Decoder, group: ExpertGroup, lane: PeerLane, max_tokens: int, cut: Overlap
) -> Stages:
    layer, sizes = decoder.moe_layers[0], (FEWEST_TOKENS, max_tokens)
    before = group.tokens_per_rank
    try:
        alone = [_time(layer, group, lane, size, Overlap()) for size in sizes]
        group.in_halves = True
        beside = [_time(layer, group, lane, size, cut) for size in sizes]
        host = [_time_host(layer, group, lane, chunks, cut) for chunks in _HOST_CHUNKS]
        dense = [_time_dense(decoder, group, lane, size) for size in sizes]
    finally:
        group.in_halves, group.tokens_per_rank = False, before
        lane.pair_counter.count()
        lane.pair_counter.move()  # what was timed was nobody's
        layer.load.move()
        lane.take_bytes_sent()
    enqueuing = fit(list(zip(_HOST_CHUNKS, host, strict=True)))
    # The other half is left to the host, which enqueues that, too.
    between = fit([(size, taken / 2) for size, taken in zip(sizes, dense, strict=True)])
    fitted, cut_in_two = (
        replace(
            fit_stages(sizes, times),
            host=enqueuing,
            between=between,
            in_turn=not layer.experts.outpace(layer.dispatcher.operations_per_byte),
            up_share=cut.up_share,
        )
        for times in (alone, beside)
    )
    put_off = layer.dispatcher.combines_here
    combine = fitted.combine if put_off else cut_in_two.combine
    return Stages(fitted, cut_in_two, replace(cut_in_two, combine=combine, put_off=put_off))


def fit_stages(sizes: Sequence[int], times: Sequence[Sequence[float]]) -> LayerCosts:
    """Of seconds by token count: upload, gate, dispatch, up, down and combine of each."""
    upload, gate, dispatch, up, down, combine = (
        fit(list(zip(sizes, stage, strict=True))) for stage in zip(*times, strict=True)
    )
    return LayerCosts(dispatch, up, down, combine, gate, upload=upload)


def _time(
    layer: MoELayer, group: ExpertGroup, lane: PeerLane, num_tokens: int, overlap: Overlap
) -> list[float]:
    """Seconds of upload, gate with the choice's exchange, dispatch, up, down and combine.

    Each is the slowest rank's.
    """
    dispatcher = layer.dispatcher
    assert isinstance(dispatcher, CopyEngineDispatcher)
    hidden = _any_hidden(group, lane, num_tokens)
    samples = []
    for _ in range(_NUM_SAMPLES + 1):
        samples.append(_sample(layer, dispatcher, lane, hidden, overlap))
        lane.check()
    return _slowest(group, [statistics.median(stage) for stage in zip(*samples[1:], strict=True)])


def _time_host(
    layer: MoELayer, group: ExpertGroup, lane: PeerLane, num_chunks: int, overlap: Overlap
) -> float:
    """Seconds that enqueuing a layer in so many chunks takes: the slowest rank's."""
    hidden = _any_hidden(group, lane, FEWEST_TOKENS)
    samples = []
    for _ in range(_HOST_WARM_UPS + _NUM_SAMPLES):
        torch.cuda.synchronize(hidden.device)
        started = time.perf_counter()
        layer.dispatcher.publish(hidden, num_chunks)
        choice = layer.gate(hidden)
        receipts = layer.dispatcher.route(choice, num_chunks)
        run_layer(layer.dispatcher, layer.experts, hidden, choice.weights, receipts, None, overlap)
        samples.append(time.perf_counter() - started)
        lane.check()
    return _slowest(group, [statistics.median(samples[_HOST_WARM_UPS:])])[0]


def _time_dense(decoder: Decoder, group: ExpertGroup, lane: PeerLane, num_tokens: int) -> float:
    """Seconds of one product as large as a layer's dense weights: the slowest rank's."""
    hidden = _any_hidden(group, lane, num_tokens)
    width = hidden.shape[1]
    weight = hidden.new_zeros(decoder.dense_elements_per_layer // width // 8 * 8, width)
    samples = []
    for _ in range(_NUM_SAMPLES + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        kernels.matmul(hidden, weight)
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return _slowest(group, [statistics.median(samples[1:])])[0]


def _any_hidden(group: ExpertGroup, lane: PeerLane, num_tokens: int) -> torch.Tensor:
    """Hidden states [T, D] of a step with so many tokens on every rank."""
    group.tokens_per_rank = (num_tokens,) * lane.layout.num_ranks
    generator = torch.Generator(lane.rows.device).manual_seed(group.rank)
    shape = (num_tokens, lane.rows.shape[1])
    return torch.randn(shape, generator=generator, dtype=lane.rows.dtype, device=lane.rows.device)


def _slowest(group: ExpertGroup, seconds: Sequence[float]) -> list[float]:
    """The largest of all ranks' numbers, each."""
    assert group.communicator is not None
    everyone = gather_bytes(group.communicator, np.array(seconds).tobytes())
    slowest: list[float] = np.max([np.frombuffer(part) for part in everyone], axis=0).tolist()
    return slowest


def _sample(
    layer: MoELayer,
    dispatcher: CopyEngineDispatcher,
    lane: PeerLane,
    hidden: torch.Tensor,
    overlap: Overlap,
) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(7)]
    up_ctas, down_ctas = overlap.up_ctas, overlap.down_ctas
    if not layer.experts.outpace(dispatcher.operations_per_byte):
        up_ctas = down_ctas = overlap.expert_ctas

    marks[0].record()
    dispatcher.publish(hidden)
    # Beside the gate it would be in the gate's time. Codes of int8 are made in it, too: what these
    # take is hidden in the model as the upload is, and not in a step.
    lane.wait_for_upload(0)
    marks[1].record()
    choice = layer.gate(hidden, dispatcher.pair_sort)
    (receipt,) = dispatcher.route(choice, 1)
    marks[2].record()
    rows = dispatcher.dispatch(hidden, receipt)
    marks[3].record()
    inner = layer.experts.up(rows, receipt, max_ctas=up_ctas)
    marks[4].record()
    output = dispatcher.output_of(receipt)
    pairs = layer.experts.down(inner, receipt, output=output, max_ctas=down_ctas)
    marks[5].record()
    dispatcher.combine(pairs, choice.weights, receipt)
    marks[6].record()
    marks[6].synchronize()
    pairs_of_marks = zip(marks, marks[1:], strict=False)
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs_of_marks]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
