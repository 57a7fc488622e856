"""The gate and the permutation of its pairs, by liblight_ops: one launch for both where it can be.

The router's product of a few tokens is part of that launch, so their logits never leave the chip;
of more tokens the logits are made first. A row's logits have the same bits either way where
`deterministic` is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Required, TypedDict, Unpack

import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.kernels.checks import (
    HALF_DTYPES,
    require_cuda,
    require_dtype,
    require_half,
    require_multiple,
    require_rows,
    require_shape,
)
from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.library import address, library
from lightmoe.kernels.matmul import matmul
from lightmoe.kernels.reference import Scoring
from lightmoe.kernels.sort_pairs import (
    MAX_EXPERTS,
    MAX_EXPERTS_PER_TOKEN,
    PairTable,
    sort_pairs,
)
from lightmoe.kernels.workspace import workspace_of

__all__ = ["FUSED_TOKENS", "GateOptions", "GateRule", "route_tokens", "sort_pairs", "topk_gate"]

MAX_GROUPS = 32
FUSED_TOKENS = 64
"""So many tokens' router product is part of the gate's launch."""

MAX_FUSED_WIDTH = 16384

_STEM = "topk_gate"
_FLOAT32 = 2
_DTYPES = HALF_DTYPES | {torch.float32: _FLOAT32}


class GateOptions(TypedDict, total=False):
    """GateRule's fields that go by name; those with a default may be left out."""

    renormalize: Required[bool]
    scale: float
    num_groups: int
    num_groups_per_token: int
    scoring: Scoring
    bias: Tensor | None


@dataclass(frozen=True)
class GateRule:
    """How logits become experts and weights: the arguments of reference.topk_gate."""

    num_experts_per_token: int
    renormalize: bool
    scale: float = 1.0
    num_groups: int = 1
    num_groups_per_token: int = 1
    scoring: Scoring = "softmax"
    bias: Tensor | None = None

    def check(self, num_experts: int) -> None:
        """UsageError unless the kernels take this rule for so many experts."""
        k, groups, chosen = self.num_experts_per_token, self.num_groups, self.num_groups_per_token
        if not 1 <= num_experts <= MAX_EXPERTS:
            raise UsageError(f"{_STEM}: {num_experts} experts; it takes 1 to {MAX_EXPERTS}")
        if not 1 <= k <= min(num_experts, MAX_EXPERTS_PER_TOKEN):
            raise UsageError(
                f"{_STEM}: {k} experts per token of {num_experts}; it takes 1 to"
                f" {min(num_experts, MAX_EXPERTS_PER_TOKEN)}"
            )
        if not 1 <= groups <= MAX_GROUPS or num_experts % groups:
            raise UsageError(
                f"{_STEM}: {groups} groups of {num_experts} experts; it takes up to {MAX_GROUPS}"
                " of the same size"
            )
        size = num_experts // groups
        if not 1 <= chosen <= groups or chosen * size < k:
            raise UsageError(
                f"{_STEM}: {chosen} of {groups} groups per token hold {chosen * size} experts;"
                f" {k} are to be chosen"
            )
        if self.scoring == "sigmoid" and chosen < groups and size < 2:
            raise UsageError(f"{_STEM}: sigmoid groups have {size} expert; they need two")
        if self.bias is not None:
            if self.scoring != "sigmoid":
                raise UsageError(f"{_STEM}: bias goes with sigmoid scores, not {self.scoring}")
            require_shape(_STEM, "bias", self.bias, num_experts)
            require_dtype(_STEM, "bias", self.bias, torch.float32)


def topk_gate(
    hidden: Tensor | None,
    router_weight: Tensor | None,
    num_experts_per_token: int,
    *,
    logits: Tensor | None = None,
    deterministic: bool = True,
    **options: Unpack[GateOptions],
) -> tuple[Tensor, Tensor]:
    """[T, D] x [E, D], or logits [T, E] -> experts int32 [T, K], weights fp32 [T, K].

    Logits that are computed here are fp32 sums, not rounded. UsageError names the tensor that does
    not fit. The rest is reference.topk_gate's.
    """
    rule = GateRule(num_experts_per_token, **options)
    source = _source(hidden, router_weight, logits, rule, deterministic)
    experts, weights = _choice(source, rule)
    _launch_gate(source, rule, experts, weights, _no_sort(source, rule))
    return experts, weights


def route_tokens(
    hidden: Tensor | None,
    router_weight: Tensor | None,
    num_experts_per_token: int,
    *,
    slots: Tensor,
    tokens_per_tile: int,
    logits: Tensor | None = None,
    deterministic: bool = True,
    pair_weight: Tensor | None = None,
    expert_counts: Tensor | None = None,
    **options: Unpack[GateOptions],
) -> tuple[Tensor, Tensor, PairGroups, Tensor, Tensor]:
    """topk_gate and sort_pairs in one launch: experts, weights, groups, pair_row, pair_index.

    `pair_weight` fp32 [P] and `expert_counts` int32 [E] are written where they are given: the
    weight of each sorted pair, and how many pairs each expert has.
    """
    rule = GateRule(num_experts_per_token, **options)
    source = _source(hidden, router_weight, logits, rule, deterministic)
    experts, weights = _choice(source, rule)
    table = PairTable.empty(experts, source.num_experts, slots, tokens_per_tile)
    sort = table.fields(source.num_experts, experts, pair_weight, expert_counts)
    _launch_gate(source, rule, experts, weights, sort)
    return experts, weights, table.groups, table.pair_row, table.pair_index


@dataclass(slots=True)
class _Source:
    """Where the logits come from: given or made, or of the gate's own product."""

    logits: Tensor | None
    hidden: Tensor | None
    router_weight: Tensor | None
    num_tokens: int
    num_experts: int
    device: torch.device


def _source(
    hidden: Tensor | None,
    router_weight: Tensor | None,
    logits: Tensor | None,
    rule: GateRule,
    deterministic: bool,
) -> _Source:
    if logits is None:
        if hidden is None or router_weight is None:
            raise UsageError(f"{_STEM}: it needs logits, or hidden and router_weight; give them")
        check_router(hidden, router_weight)
        (num_tokens, width), num_experts = hidden.shape, router_weight.shape[0]
        rule.check(num_experts)
        require_cuda(_STEM, hidden=hidden, router_weight=router_weight, bias=rule.bias)
        if num_tokens <= FUSED_TOKENS and width <= MAX_FUSED_WIDTH:
            return _Source(None, hidden, router_weight, num_tokens, num_experts, hidden.device)
        logits = _logits(hidden, router_weight, deterministic)
    else:
        require_shape(_STEM, "logits", logits, None, None)
        if logits.dtype not in _DTYPES:
            raise UsageError(
                f"{_STEM}: logits is {logits.dtype}; it needs float32, float16 or bfloat16"
            )
        require_rows(_STEM, "logits", logits)
        rule.check(logits.shape[1])
        require_cuda(_STEM, logits=logits, bias=rule.bias)
    return _Source(logits, None, None, logits.shape[0], logits.shape[1], logits.device)


def check_router(hidden: Tensor, router_weight: Tensor) -> None:
    """UsageError unless the kernels multiply hidden [T, D] and router_weight [E, D]."""
    require_shape(_STEM, "router_weight", router_weight, None, None)
    require_shape(_STEM, "hidden", hidden, None, router_weight.shape[1])
    require_half(_STEM, "hidden", hidden)
    require_multiple(_STEM, "hidden", hidden, 1, 8)
    require_rows(_STEM, "hidden", hidden)
    require_rows(_STEM, "router_weight", router_weight)
    if router_weight.dtype not in (hidden.dtype, torch.float32):
        raise UsageError(
            f"{_STEM}: router_weight is {router_weight.dtype}; it needs {hidden.dtype} or float32"
        )


def _logits(hidden: Tensor, router_weight: Tensor, deterministic: bool) -> Tensor:
    """The router's product for many tokens, fp32 [T, E]."""
    if not deterministic and router_weight.dtype == hidden.dtype:
        return matmul(hidden, router_weight, output_float32=True, deterministic=False)
    (num_tokens, width), num_experts = hidden.shape, router_weight.shape[0]
    logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=hidden.device)
    library().launch(
        "router_logits",
        hidden.device,
        hidden=address(hidden),
        router_weight=address(router_weight),
        logits=address(logits),
        num_tokens=num_tokens,
        num_experts=num_experts,
        width=width,
        input=_DTYPES[hidden.dtype],
        router=_DTYPES[router_weight.dtype],
        max_ctas=0,
    )
    return logits


def _choice(source: _Source, rule: GateRule) -> tuple[Tensor, Tensor]:
    shape = (source.num_tokens, rule.num_experts_per_token)
    experts = torch.empty(shape, dtype=torch.int32, device=source.device)
    return experts, torch.empty(shape, dtype=torch.float32, device=source.device)


def _no_sort(source: _Source, rule: GateRule) -> tuple[int, ...]:
    workspace = workspace_of(source.device)
    sizes = (source.num_tokens, source.num_experts, rule.num_experts_per_token)
    return (0, 0, 0, 0, 0, 0, 0, address(workspace), workspace.numel(), 1, *sizes)


def _launch_gate(
    source: _Source, rule: GateRule, experts: Tensor, weights: Tensor, sort: tuple[int, ...]
) -> None:
    values = source.hidden if source.logits is None else source.logits
    assert values is not None, "logits or hidden"
    router = values if source.router_weight is None else source.router_weight
    library().launch(
        _STEM,
        source.device,
        logits=address(source.logits),
        hidden=address(source.hidden),
        router_weight=address(source.router_weight),
        bias=address(rule.bias),
        experts=address(experts),
        weights=address(weights),
        sort=sort,
        width=0 if source.hidden is None else source.hidden.shape[1],
        sigmoid=rule.scoring == "sigmoid",
        renormalize=rule.renormalize,
        scale=rule.scale,
        num_groups=rule.num_groups,
        num_groups_per_token=rule.num_groups_per_token,
        input=_DTYPES[values.dtype],
        router=_DTYPES[router.dtype],
        max_ctas=0,
    )
