"""vLLM's MoE layers, where vLLM is installed: fused_experts in 16 bits, Marlin for int4 and int8.

Written against vLLM 0.33's functions; the routing before them is torch's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from problem import Codes, Problem
from torch import Tensor

from adapters import Unsupported


def make_fused(problem: Problem) -> Callable[[], Tensor]:
    """fused_experts with the configuration that vLLM picks itself."""
    _require_vllm()
    if problem.weights.is_quantized:
        raise Unsupported("vLLM's int4 peer is Marlin: --impls vllm_marlin")
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    weights = problem.weights

    def call() -> Tensor:
        chosen, pair_weights = _route(problem)
        return fused_experts(
            problem.hidden,
            weights.gate_up,
            weights.down,
            topk_weights=pair_weights,
            topk_ids=chosen,
        )

    return call


def make_marlin(problem: Problem) -> Callable[[], Tensor]:
    """fused_marlin_moe over repacked codes."""
    _require_vllm()
    gate_up, down = problem.weights.gate_up_codes, problem.weights.down_codes
    if gate_up is None or down is None:
        raise Unsupported("Marlin takes int4 or int8 weights")
    from vllm.model_executor.layers.fused_moe.fused_marlin_moe import fused_marlin_moe
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8 if gate_up.num_bits == 4 else scalar_types.uint8b128
    prepared = problem.weights.prepared
    if "marlin" not in prepared:
        prepared["marlin"] = (*_repack(gate_up), *_repack(down))
    first, first_scales, second, second_scales = prepared["marlin"]

    def call() -> Tensor:
        chosen, pair_weights = _route(problem)
        return fused_marlin_moe(
            problem.hidden,
            first,
            second,
            bias1=None,
            bias2=None,
            w1_scale=first_scales,
            w2_scale=second_scales,
            topk_weights=pair_weights,
            topk_ids=chosen,
            quant_type_id=kind.id,
            global_num_experts=problem.shape.num_experts,
        )

    return call


def _repack(codes: Codes) -> tuple[Tensor, Tensor]:
    """Codes [E, N, D] and scales in Marlin's order, by way of GPTQ's: int32 [E, D / pack, N]."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        marlin_moe_permute_scales,
    )

    num_experts, features, depth = codes.values.shape
    per_word = 32 // codes.num_bits
    words = torch.empty(
        num_experts, depth // per_word, features, dtype=torch.int32, device=codes.values.device
    )
    shifts = torch.arange(per_word, device=words.device, dtype=torch.int64) * codes.num_bits
    for expert in range(num_experts):
        parts = codes.values[expert].t().long().unflatten(0, (-1, per_word))
        total = (parts << shifts[:, None]).sum(1)
        words[expert] = (total - ((total >> 31) << 32)).int()  # the same 32 bits, signed
    unsorted = torch.empty(num_experts, 0, dtype=torch.int32, device=words.device)
    packed = _custom_ops.gptq_marlin_moe_repack(words, unsorted, depth, features, codes.num_bits)
    scales = marlin_moe_permute_scales(
        codes.scales.transpose(1, 2).contiguous(), depth, features, codes.group_size
    )
    return packed, scales


def _route(problem: Problem) -> tuple[Tensor, Tensor]:
    weights, chosen = problem.logits.softmax(-1).topk(problem.shape.num_experts_per_token, dim=-1)
    if problem.shape.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen.int(), weights


def _require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise Unsupported("vLLM is not installed")
