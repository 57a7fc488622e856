"""The experts module of transformers with its grouped_mm backend, routing op for op in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from problem import Problem
from torch import Tensor

from adapters import Unsupported


def make(problem: Problem) -> Callable[[], Tensor]:
    """Mixtral's experts module around the problem's weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    if problem.weights.is_quantized:
        raise Unsupported("transformers has no int4 or e4m3 experts in one product")
    if problem.hidden.dtype != torch.bfloat16:
        raise Unsupported("torch's grouped_mm takes bfloat16")
    shape = problem.shape
    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.expert_size,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_token,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(problem.weights.gate_up, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(problem.weights.down, requires_grad=False)

    @torch.no_grad()
    def call() -> Tensor:
        scores = problem.logits.softmax(-1)
        weights, chosen = scores.topk(shape.num_experts_per_token, dim=-1)
        if shape.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts(problem.hidden, chosen, weights.to(problem.hidden.dtype))

    return call
