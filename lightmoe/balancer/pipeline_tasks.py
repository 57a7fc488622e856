"""A MoE layer as tasks and bytes: what each rank computes and sends, for choices drawn at random.

The order of the tasks is that of moe/pipeline.py. Shapes: W ranks, T tokens a rank, E experts, K
experts per token, D model width, F expert width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lightmoe.balancer.fluid import Name, Task
from lightmoe.models.model_config import ModelConfig
from lightmoe.moe.placement import initial_placement
from lightmoe.topology import Device, Topology

_CHOICE_BYTES = 2  # an expert's number on the wire
_SECOND_SHARE = 1 / 3  # of the experts' work: [P, F] x [F, D] beside [P, D] x [D, 2F]
_CPU_BLOCK_ROWS = 16  # the reference pads every expert's rows to blocks of so many


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Sizes of one MoE layer. `attention_elements` are the weights of the attention before it,
    left out of a layer that is simulated alone."""

    name: str
    hidden_size: int
    expert_size: int
    num_experts: int
    num_per_token: int
    element_bytes: float
    expert_element_bytes: float
    attention_elements: int = 0

    @property
    def expert_elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden_size * self.expert_size

    @classmethod
    def of_model(
        cls, model: ModelConfig, name: str, element_bytes: float, expert_element_bytes: float
    ) -> LayerShape:
        """The layers of a model; attention is the mean of what is dense in a layer."""
        return cls(
            name=name,
            hidden_size=model.hidden_size,
            expert_size=model.moe_intermediate_size,
            num_experts=model.num_experts,
            num_per_token=model.num_experts_per_tok,
            element_bytes=element_bytes,
            expert_element_bytes=expert_element_bytes,
            attention_elements=model.dense_elements_per_layer,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFit:
    """What measured stages cost beside what the roofline says: alpha + factor * roofline."""

    alpha_seconds: float = 0.0
    factor: float = 1.0

    def seconds(self, roofline: float) -> float:
        """A stage's time; no work takes none."""
        return self.alpha_seconds + self.factor * roofline if roofline else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Free parameters of the model: of each computing stage, of each exchange, and by how much a
    rank computes slower while it exchanges."""

    compute: StageFit = field(default_factory=StageFit)
    exchange: StageFit = field(default_factory=StageFit)
    slowdown: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one chunk makes: rows and pairs int [W, W] by source and target rank, and on each rank
    the experts touched [W] and the rows computed [W], zero-padded as the device pads them."""

    rows: np.ndarray
    pairs: np.ndarray
    touched: np.ndarray
    computed: np.ndarray


@dataclass(slots=True)
class Program:
    """Tasks of every rank, and bytes [W, W] of every exchange."""

    tasks: list[list[Task]]
    exchanges: dict[Name, np.ndarray]


@functools.lru_cache(maxsize=16)
def draw_choices(
    shape: LayerShape, num_ranks: int, num_tokens: int, skew: float, seed: int
) -> np.ndarray:
    """Experts [W, T, K]: distinct for each token, drawn with weights 1 / i^skew in random order.

    The K largest of log-weight plus Gumbel noise are a draw without replacement.
    """
    random = np.random.default_rng(seed)
    weights = -skew * np.log(np.arange(1, shape.num_experts + 1))
    keys = random.permutation(weights) + random.gumbel(
        size=(num_ranks, num_tokens, shape.num_experts)
    )
    kept = np.argpartition(-keys, shape.num_per_token - 1, axis=-1)
    chosen: np.ndarray = kept[..., : shape.num_per_token]
    return chosen


def chunk_load(
    shape: LayerShape, choices: np.ndarray, chunk: int, num_chunks: int, block_rows: int
) -> Load:
    """The load of one chunk of every rank's tokens, one copy of each expert, all ranks alike."""
    num_ranks, num_tokens, num_per_token = choices.shape
    homes = initial_placement(1, shape.num_experts, num_ranks).homes[0]
    part = choices[:, num_tokens * chunk // num_chunks : num_tokens * (chunk + 1) // num_chunks]
    target = homes[part]  # [W, T, K]
    rows = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    pairs = np.zeros_like(rows)
    for rank in range(num_ranks):
        goes = target == rank
        rows[:, rank] = goes.any(axis=2).sum(axis=1)
        pairs[:, rank] = goes.sum(axis=(1, 2))
    per_expert = np.bincount(part.ravel(), minlength=shape.num_experts)
    padded = -(-per_expert // block_rows) * block_rows
    return Load(
        rows=rows,
        pairs=pairs,
        touched=np.bincount(homes, weights=per_expert > 0, minlength=num_ranks),
        computed=np.bincount(homes, weights=padded, minlength=num_ranks),
    )


def roofline_seconds(device: Device, flops: float, num_bytes: float) -> float:
    """The longer of computing and of moving bytes in the device's memory."""
    return max(flops / device.reached_flops_per_second, num_bytes / device.reached_bytes_per_second)


def expert_seconds(shape: LayerShape, device: Device, load: Load, rank: int) -> float:
    """Roofline of one chunk's experts on a rank: FLOPs, or the weights of the experts touched and
    the activations; and packing rows and adding up results, which memory bounds."""
    width, pairs = shape.hidden_size, float(load.pairs[:, rank].sum())
    activations = pairs * (2 * width + 3 * shape.expert_size) * shape.element_bytes
    weights = float(load.touched[rank]) * shape.expert_elements * shape.expert_element_bytes
    products = roofline_seconds(
        device, 2 * float(load.computed[rank]) * shape.expert_elements, weights + activations
    )
    moved = float(load.rows[rank].sum() + pairs + load.pairs[rank].sum()) * 2 * width
    return products + moved * shape.element_bytes / device.reached_bytes_per_second


def token_seconds(shape: LayerShape, device: Device, num_tokens: int, num_elements: int) -> float:
    """Roofline of a product of `num_tokens` rows with so many dense weights."""
    num_bytes = (num_elements + 2 * num_tokens * shape.hidden_size) * shape.element_bytes
    return roofline_seconds(device, 2.0 * num_tokens * num_elements, num_bytes)


def layer_program(
    shape: LayerShape,
    topology: Topology,
    micro_batches: Sequence[np.ndarray],
    *,
    num_layers: int,
    num_chunks: int,
    serial: bool,
    results_beside: bool,
    with_attention: bool,
    calibration: Calibration,
) -> Program:
    """Tasks of some layers for micro-batches of choices [W, T, K], in the order of the pipeline.

    `serial`: one stream, nothing overlaps. Else attention, gate and experts are one stream and the
    exchanges another; micro-batches take turns. `results_beside`: in either case results leave
    while the experts' second product makes them.
    """
    writer = _Writer(
        shape, topology, micro_batches, num_chunks, serial, results_beside, calibration
    )
    for layer in range(num_layers):
        for batch in range(len(micro_batches)):
            writer.front(layer, batch, with_attention)
            writer.first_rows(layer, batch)
        for batch in range(len(micro_batches)):
            writer.chunks(layer, batch)
    return Program(writer.tasks, writer.exchanges)


class _Writer:
    def __init__(
        self,
        shape: LayerShape,
        topology: Topology,
        micro_batches: Sequence[np.ndarray],
        num_chunks: int,
        serial: bool,
        results_beside: bool,
        calibration: Calibration,
    ) -> None:
        self.shape, self.topology = shape, topology
        self.ranks = range(topology.num_ranks)
        self.num_tokens = [choices.shape[1] for choices in micro_batches]
        blocks = _CPU_BLOCK_ROWS if topology.device(0).kind == "cpu" else 1
        self.loads = [
            [chunk_load(shape, choices, c, num_chunks, blocks) for c in range(num_chunks)]
            for choices in micro_batches
        ]
        self.serial, self.calibration = serial, calibration
        self.results_beside = results_beside
        self.tasks: list[list[Task]] = [[] for _ in self.ranks]
        self.exchanges: dict[Name, np.ndarray] = {}

    def front(self, layer: int, batch: int, with_attention: bool) -> None:
        """Attention and gate, then the exchange of the choice."""
        shape = self.shape
        before: list[Name] = [("combined", layer - 1, batch)] if layer else []
        if with_attention:
            self.compute("attention", layer, batch, before, shape.attention_elements)
            before = [("attention", layer, batch)]
        self.compute("gate", layer, batch, before, shape.hidden_size * shape.num_experts)
        num_bytes = self.num_tokens[batch] * shape.num_per_token * _CHOICE_BYTES
        choice = np.full((len(self.ranks), len(self.ranks)), float(num_bytes))
        np.fill_diagonal(choice, 0)
        self.exchange(("choice", layer, batch), [("gate", layer, batch)], choice)

    def first_rows(self, layer: int, batch: int) -> None:
        """Rows of the first chunks out: of two, as there are two sets of buffers."""
        num_first = 1 if self.serial else min(2, len(self.loads[batch]))
        for chunk in range(num_first):
            self.dispatch_and_combine(layer, batch, chunk, None, [("choice", layer, batch)])

    def chunks(self, layer: int, batch: int) -> None:
        """Experts and combine of every chunk, and the rows of the chunks after the first."""
        last = len(self.loads[batch]) - 1
        for chunk in range(last + 1):
            self.experts(layer, batch, chunk)
            if self.serial or chunk == last:
                after = chunk + 1 if chunk < last else None
                self.dispatch_and_combine(layer, batch, None, chunk, [])
                if after is not None:
                    self.dispatch_and_combine(layer, batch, after, None, [])
            else:
                after = chunk + 2 if chunk + 2 <= last else None
                self.dispatch_and_combine(layer, batch, after, chunk, [])
        ends: list[Name] = [("back", layer, batch, last), ("experts", layer, batch, last)]
        self.add(("combined", layer, batch), ends, None, "exchange")

    def experts(self, layer: int, batch: int, chunk: int) -> None:
        """The experts of one chunk, once its rows are here."""
        seconds = [
            expert_seconds(self.shape, self.topology.device(rank), self.loads[batch][chunk], rank)
            for rank in self.ranks
        ]
        needs: list[Name] = [("out", layer, batch, chunk)]
        if self.results_beside:
            up: Name = ("up", layer, batch, chunk)
            self.add(up, needs, [whole * (1 - _SECOND_SHARE) for whole in seconds])
            needs, seconds = [up], [whole * _SECOND_SHARE for whole in seconds]
        self.add(("experts", layer, batch, chunk), needs, seconds)

    def dispatch_and_combine(
        self, layer: int, batch: int, out: int | None, back: int | None, needs: list[Name]
    ) -> None:
        """One exchange: rows of a chunk out, results of another back."""
        shape, loads = self.shape, self.loads[batch]
        matrix = np.zeros((len(self.ranks), len(self.ranks)))
        row_bytes = shape.hidden_size * shape.element_bytes
        if out is not None:
            matrix += loads[out].rows * row_bytes
        if back is not None:
            matrix += loads[back].pairs.T * row_bytes
            made = "up" if self.results_beside else "experts"
            needs = [*needs, (made, layer, batch, back)]
        np.fill_diagonal(matrix, 0)
        name = ("exchange", layer, batch, out, back)
        self.exchange(name, needs, matrix, beside=back is not None and self.results_beside)
        for kind, chunk in (("out", out), ("back", back)):
            if chunk is not None:  # a name for others to wait for, without work
                self.add((kind, layer, batch, chunk), [name], None, "exchange")

    def compute(self, stage: str, layer: int, batch: int, needs: list[Name], elements: int) -> None:
        """A product of a micro-batch's tokens with so many dense weights."""
        seconds = [
            token_seconds(self.shape, self.topology.device(rank), self.num_tokens[batch], elements)
            for rank in self.ranks
        ]
        self.add((stage, layer, batch), needs, seconds)

    def exchange(
        self, name: Name, needs: list[Name], matrix: np.ndarray, *, beside: bool = False
    ) -> None:
        """An exchange of all ranks."""
        self.exchanges[name] = matrix
        stream = "compute" if self.serial and not beside else "exchange"
        for of_rank in self.tasks:
            of_rank.append(Task(name=name, stream=stream, needs=tuple(needs), is_exchange=True))

    def add(
        self,
        name: Name,
        needs: list[Name],
        rooflines: list[float] | None,
        stream: str = "compute",
    ) -> None:
        """Computing on every rank, as calibrated."""
        for rank, of_rank in enumerate(self.tasks):
            seconds = self.calibration.compute.seconds(rooflines[rank]) if rooflines else 0.0
            where = "compute" if self.serial else stream
            of_rank.append(Task(name=name, stream=where, needs=tuple(needs), seconds=seconds))
