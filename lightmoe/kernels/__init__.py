"""The operators of a model. Each takes the road of its tensors: float16 and bfloat16 on a GPU go to
liblight_ops, everything else to `reference`, the specification. There both modes of `deterministic`
are one: row-invariant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from lightmoe.kernels import reference
from lightmoe.kernels.add_norm import add_norm as _add_norm
from lightmoe.kernels.checks import is_native
from lightmoe.kernels.combine import combine as _combine
from lightmoe.kernels.fp8_gemm import fp8_gemm as _fp8_gemm
from lightmoe.kernels.fp8_gemm import plan_fp8
from lightmoe.kernels.grouped_gemm import GroupedProduct, plan_weights
from lightmoe.kernels.grouped_gemm import grouped_gemm as _grouped_gemm
from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.matmul import matmul as _matmul
from lightmoe.kernels.paged_attention import paged_attention as _paged_attention
from lightmoe.kernels.permute import permute as _permute
from lightmoe.kernels.permute import permute_fp8 as _permute_fp8
from lightmoe.kernels.permute import permute_int8 as _permute_int8
from lightmoe.kernels.quant_gemm import plan_quantized
from lightmoe.kernels.quant_gemm import quant_gemm as _quant_gemm
from lightmoe.kernels.reference import Fp8Weights, QuantizedMatrix, rms_norm, rotate, swiglu
from lightmoe.kernels.rotary_cache import rotary_cache as _rotary_cache
from lightmoe.kernels.route import route_chunks as _route_chunks
from lightmoe.kernels.route_reference import RouteSplit
from lightmoe.kernels.route_reference import route_chunks as _route_chunks_on_host
from lightmoe.kernels.sort_pairs import sort_chunks as _sort_chunks
from lightmoe.kernels.sort_pairs import sort_pairs as _sort_pairs
from lightmoe.kernels.topk_gate import route_tokens as _route_tokens
from lightmoe.kernels.topk_gate import topk_gate as _topk_gate

__all__ = [
    "Fp8Weights",
    "PairGroups",
    "QuantizedMatrix",
    "RouteSplit",
    "add_norm",
    "combine",
    "equal_groups",
    "fp8_gemm",
    "grouped_gemm",
    "grouped_product",
    "matmul",
    "paged_attention",
    "permute",
    "permute_fp8",
    "permute_int8",
    "quant_gemm",
    "rms_norm",
    "rotary_cache",
    "rotate",
    "route_chunks",
    "route_tokens",
    "sort_chunks",
    "sort_pairs",
    "swiglu",
    "tokens_per_tile",
    "topk_gate",
]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_OF_GPUS = (
    *("deterministic", "expected", "groups_settled", "max_ctas", "max_queries"),
    "output_rows",  # the reference returns the rows
)
"""Arguments that say how, not what; the reference has one way."""


def _by_tensor(
    native: Callable[_Parameters, _Result],
    specification: Callable[..., _Result],
    takes: Callable[[Tensor], bool] = is_native,
) -> Callable[_Parameters, _Result]:
    """`native` where its first argument says so, else the specification."""

    @functools.wraps(native)
    def operator(*tensors: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        first: Any = tensors[0]
        if first is None:
            first = options["logits"]  # in place of the hidden states; the kernels take fp32
            native_here = first.is_cuda
        else:
            native_here = takes(first)
        if native_here:
            return native(*tensors, **options)
        return specification(
            *tensors, **{name: option for name, option in options.items() if name not in _OF_GPUS}
        )

    return operator


def _chosen_natively(experts: Tensor) -> bool:
    """The kernels' experts are int32, the reference's int64."""
    return experts.is_cuda and experts.dtype == torch.int32


topk_gate = _by_tensor(_topk_gate, reference.topk_gate)
route_tokens = _by_tensor(_route_tokens, reference.route_tokens)
sort_chunks = _by_tensor(_sort_chunks, reference.sort_chunks, _chosen_natively)
sort_pairs = _by_tensor(_sort_pairs, reference.sort_pairs, _chosen_natively)
route_chunks = _by_tensor(_route_chunks, _route_chunks_on_host, _chosen_natively)
permute = _by_tensor(_permute, reference.permute)
permute_int8 = _by_tensor(_permute_int8, reference.permute_int8)
permute_fp8 = _by_tensor(_permute_fp8, reference.permute_fp8)
matmul = _by_tensor(_matmul, reference.matmul)
grouped_gemm = _by_tensor(_grouped_gemm, reference.grouped_gemm)
quant_gemm = _by_tensor(_quant_gemm, reference.quant_gemm)
fp8_gemm = _by_tensor(_fp8_gemm, reference.fp8_gemm, lambda rows: rows.is_cuda)
combine = _by_tensor(_combine, reference.combine)
paged_attention = _by_tensor(_paged_attention, reference.paged_attention)
rotary_cache = _by_tensor(_rotary_cache, reference.rotary_cache)
add_norm = _by_tensor(_add_norm, reference.add_norm)


def grouped_product(
    weights: Tensor, *, swiglu: bool = False, deterministic: bool = True
) -> Callable[..., Tensor]:
    """grouped_gemm with weights that stay: it takes the rows, then the rest, and costs less."""
    native = GroupedProduct(weights, swiglu=swiglu, deterministic=deterministic)
    if is_native(weights):
        return native

    def specification(rows: Tensor, *rest: Any, **options: Any) -> Tensor:
        return reference.grouped_gemm(rows, weights, *rest, swiglu=swiglu, **options)

    return _by_tensor(native.__call__, specification)


def tokens_per_tile(
    weights: Tensor | QuantizedMatrix | Fp8Weights,
    num_pairs: int,
    num_groups: int,
    *,
    swiglu: bool = False,
    deterministic: bool = True,
) -> int:
    """How many pairs a tile has in the product with these weights: what sorting needs to know."""
    numbers = weights if isinstance(weights, Tensor) else weights.scales
    if not (is_native(numbers) or (numbers.is_cuda and isinstance(weights, Fp8Weights))):
        return reference.BLOCK_ROWS
    if isinstance(weights, Tensor):
        plan = plan_weights(
            weights, num_pairs, num_groups, swiglu=swiglu, deterministic=deterministic
        )
    elif isinstance(weights, Fp8Weights):
        plan = plan_fp8(weights, num_pairs, num_groups)
    else:
        plan = plan_quantized(weights, num_pairs, num_groups, deterministic=deterministic)
    return plan.tile.tokens


def equal_groups(weights: Tensor, pairs_per_group: int) -> PairGroups:
    """Groups of as many pairs each for weights [G, N, D], group g with weight g."""
    num_groups = len(weights)
    tokens = tokens_per_tile(weights, num_groups * pairs_per_group, num_groups)
    sizes = (num_groups, pairs_per_group, tokens, weights.device)
    if not weights.is_cuda:
        return _equal_groups(*sizes, stream=0)
    if torch.cuda.is_current_stream_capturing():  # filled by that graph's replays only
        return PairGroups.of_equal_size(*sizes)
    return _equal_groups(*sizes, stream=torch.cuda.current_stream(weights.device).cuda_stream)


@functools.lru_cache(maxsize=256)
def _equal_groups(
    num_groups: int, pairs_per_group: int, tokens: int, device: torch.device, *, stream: int
) -> PairGroups:
    """Once for each stream: another would have to wait for the tables to be filled."""
    return PairGroups.of_equal_size(num_groups, pairs_per_group, tokens, device)
