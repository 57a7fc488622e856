"""When an implementation's output counts as right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from floors import layer_work
from problem import Problem
from torch import Tensor

ERROR_LIMITS = {"bf16": 4e-3, "fp16": 1e-3}
# A sum that rounds otherwise may choose another code between the products: 6 % of that element.
FP8_LIMIT = 1e-2
PEER_LIMIT = 2e-2  # other implementations round where they like
FAST_FLOAT64 = (80, 90)  # compute capabilities whose float64 is as fast as their float32
FLOAT64_FLOPS = 1e11  # on the others float64 stays affordable below this


def error_limit(impl: str, activation: str, dtype: str = "") -> float:
    """The largest relative error of a layer's output that is rounding; `dtype` of the weights."""
    if impl != "lightmoe":
        return PEER_LIMIT
    return FP8_LIMIT if dtype == "fp8" else ERROR_LIMITS[activation]


def reference_dtype(problem: Problem, capability: int) -> torch.dtype:
    """float64, or float32 where float64 would take the card minutes."""
    flops = layer_work(problem.shape, problem.num_tokens, problem.shape.num_experts, "bf16").flops
    fast = capability in FAST_FLOAT64 or flops < FLOAT64_FLOPS
    return torch.float64 if fast else torch.float32


class _HasOutput(Protocol):
    @property
    def output(self) -> Tensor: ...


def poisoned(call: Callable[[], Tensor | None], holder: _HasOutput) -> Tensor:
    """The output of one call in which every tensor starts as NaN, also those the call allocates.

    The output is what the call returns, or `holder.output` where it returns nothing.
    """
    holder.output.fill_(float("nan"))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about peers' nondeterministic steps
            returned = call()
    finally:
        torch.use_deterministic_algorithms(before)
    return holder.output if returned is None else returned
