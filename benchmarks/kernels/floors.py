"""The least time one MoE layer can take on a card: its FLOPs, its bytes, and the larger of the two.

FLOPs = 6 T K D F: three products of D x F, two FLOP each. Bytes = each touched expert once, the
tokens in and out, the fp32 logits. What a layer keeps between its kernels is not counted, so no
real layer reaches 100 %.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP_SIZE = 128  # elements of depth that share a scale in the int4 and int8 rows


@dataclass(frozen=True)
class Shape:
    """The routed experts of one layer; `renormalize`: the K weights of a token sum to 1."""

    name: str
    hidden_size: int
    expert_size: int
    num_experts: int
    num_experts_per_token: int
    renormalize: bool

    @property
    def num_weights(self) -> int:
        """Elements of one expert's three matrices."""
        return 3 * self.hidden_size * self.expert_size


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mixtral", 4096, 14336, 8, 2, True),
        Shape("dsv2lite", 2048, 1408, 64, 6, False),
        Shape("qwen3", 2048, 768, 128, 8, True),
    )
}
# bytes of one weight: with its share of a 16-bit scale where there are scales
WEIGHT_BYTES = {
    "bf16": 2.0,
    "fp16": 2.0,
    "int4": 0.5 + 2 / GROUP_SIZE,
    "int8": 1.0 + 2 / GROUP_SIZE,
    "fp8": 1.0 + 4 / GROUP_SIZE**2,  # 128 x 128 weights share an fp32 scale
}


@dataclass(frozen=True)
class Work:
    """What a layer or a kernel has to do at least."""

    flops: float
    num_bytes: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.num_bytes


@dataclass(frozen=True)
class Floor:
    """Milliseconds of the larger term, and which one it is: "memory" or "compute"."""

    ms: float
    bound: str


def expected_active(shape: Shape, num_tokens: int) -> float:
    """Experts that at least one of T tokens chooses, on average, when all are equally likely."""
    missed = (1 - shape.num_experts_per_token / shape.num_experts) ** num_tokens
    return shape.num_experts * (1 - missed)


def layer_work(shape: Shape, num_tokens: int, num_active: float, dtype: str) -> Work:
    """A whole layer's work with `num_active` experts touched; `dtype` is that of the weights."""
    flops = 2.0 * num_tokens * shape.num_experts_per_token * shape.num_weights
    tokens = 4.0 * num_tokens * shape.hidden_size + 4.0 * num_tokens * shape.num_experts
    return Work(flops, num_active * shape.num_weights * WEIGHT_BYTES[dtype] + tokens)


def product_work(
    num_pairs: int, num_rows: int, num_active: int, depth: int, num_features: int, dtype: str,
    swiglu: bool,
) -> Work:  # fmt: skip
    """One grouped product's work: R rows of `depth` read, P outputs of `num_features` written."""
    weight_rows = 2 * num_features if swiglu else num_features
    weights = num_active * weight_rows * depth * WEIGHT_BYTES[dtype]
    rows = 2.0 * num_rows * depth + 2.0 * num_pairs * num_features
    return Work(2.0 * num_pairs * weight_rows * depth, weights + rows)


def floor(work: Work, flop_rate: float, bandwidth: float) -> Floor:
    """The floor on a card of `flop_rate` FLOP/s and `bandwidth` bytes/s."""
    compute, memory = work.flops / flop_rate, work.num_bytes / bandwidth
    return Floor(1e3 * max(compute, memory), "compute" if compute > memory else "memory")


def path_of(architecture: str | None, capability: int) -> str:
    """ "sm75", "sm80" or "sm90": which kernels run from that folder, or for None on a card of
    `capability` (75, 80 ...)."""
    number = int(architecture.removesuffix("ptx")) if architecture else capability
    return "sm75" if number < 80 else "sm80" if number < 90 else "sm90"


def instruction_of(dtype: str, path: str) -> str:
    """The instruction (see Ceilings.rate) that a path's kernels issue."""
    if path == "sm90":
        return f"wgmma_{dtype}"
    if path == "sm75":
        return "half_k8"
    return "half_k16" if dtype == "fp16" else "bfloat_k16"
