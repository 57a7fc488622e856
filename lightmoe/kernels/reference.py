"""Each kernel in plain PyTorch: the specification of the CUDA kernels, and what runs without them.

Row-invariant: the arithmetic of a row never depends on how many rows stand beside it. A matrix
product picks its summation order by its number of rows, so products run in zero-padded blocks of
BLOCK_ROWS rows: the same shape, so the same order, for every row.

Shapes: T tokens, D model width, F expert width, E experts, K experts per token, R rows, P pairs,
S slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightmoe.kernels.groups import PairGroups

BLOCK_ROWS = 16


def matmul(
    rows: Tensor, weight: Tensor, *, swiglu: bool = False, output_float32: bool = False
) -> Tensor:
    """Row-invariant `rows @ weight.T`: [R, D] x [N, D] -> [R, N].

    With `swiglu` the weight is gate rows, then as many up rows, and the result is
    silu(gate) * up [R, N / 2].
    """
    product = _product(rows, weight)
    if swiglu:
        product = _gated(product)
    return product.float() if output_float32 else product


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    num_rows = rows.shape[0]
    product = rows.new_empty(num_rows, weight.shape[0])
    columns = weight.t()
    full = num_rows - num_rows % BLOCK_ROWS
    for start in range(0, full, BLOCK_ROWS):
        torch.mm(rows[start : start + BLOCK_ROWS], columns, out=product[start : start + BLOCK_ROWS])
    if full < num_rows:
        block = rows.new_zeros(BLOCK_ROWS, rows.shape[1])
        block[: num_rows - full] = rows[full:]
        product[full:] = torch.mm(block, columns)[: num_rows - full]
    return product


Scoring = Literal["softmax", "sigmoid"]
"""How logits become scores."""


def topk_gate(
    hidden: Tensor | None,
    router_weight: Tensor | None,
    num_experts_per_token: int,
    *,
    logits: Tensor | None = None,
    renormalize: bool,
    scale: float = 1.0,
    num_groups: int = 1,
    num_groups_per_token: int = 1,
    scoring: Scoring = "softmax",
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose experts: [T, D] x [E, D] -> experts int64 [T, K], weights fp32 [T, K].

    Scores are the softmax over all experts in fp32, or sigmoids, the K best in descending order,
    ties to the lowest index; `renormalize` divides the K weights by their sum (Mixtral), `scale`
    multiplies them (DeepSeek's routed_scaling_factor). `logits` [T, E] may be given instead of
    `hidden`; else they are computed in the dtype of `router_weight`. A logit that is NaN counts as
    -inf. Where infinite logits leave softmax undefined, the largest share the weight evenly.

    `bias` fp32 [E] is added to sigmoid scores for the choice, not for the weights (DeepSeek-V3).

    With more than one group experts count in `num_groups` equal groups of neighbours; only the best
    `num_groups_per_token` groups take part, ties to the lowest group. They need to hold K experts.
    A group is as good as its best expert with softmax (DeepSeek-V2's group_limited_greedy), as the
    sum of its two best biased scores with sigmoid (DeepSeek-V3's noaux_tc).
    """
    if logits is None:
        assert hidden is not None, "logits or hidden"
        assert router_weight is not None, "hidden comes with router_weight"
        logits = matmul(hidden.to(router_weight.dtype), router_weight)
    candidates = logits = _without_nan(logits.float())
    if scoring == "softmax":
        scores = _softmax(logits)
    else:
        scores = _sigmoid(logits)
        candidates = scores if bias is None else _without_nan(scores + bias)
    experts = torch.sort(candidates, dim=-1, descending=True, stable=True).indices
    if num_groups_per_token < num_groups:
        groups = candidates.unflatten(1, (num_groups, -1))
        num_best = 1 if scoring == "softmax" else 2
        quality = _without_nan(groups.topk(num_best, dim=-1).values.sum(dim=-1))
        left_out = _not_among_best(quality, num_groups_per_token)
        left_out = left_out.repeat_interleave(groups.shape[2], dim=1).gather(1, experts)
        experts = experts.gather(1, torch.sort(left_out.byte(), dim=-1, stable=True).indices)
    experts = experts[:, :num_experts_per_token].contiguous()
    weights = scores.gather(1, experts)
    if renormalize:
        # Sigmoid scores may all be 0; so little changes no other sum.
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return experts, weights * scale


def _without_nan(values: Tensor) -> Tensor:
    return values.masked_fill(values.isnan(), float("-inf"))


def _softmax(logits: Tensor) -> Tensor:
    """Rows with an infinite maximum are shared among the elements that have it."""
    largest = logits.amax(dim=-1, keepdim=True)
    shared = torch.zeros_like(logits).masked_fill(logits != largest, float("-inf"))
    return torch.where(largest.isinf(), shared, logits).softmax(dim=-1)


def _sigmoid(logits: Tensor) -> Tensor:
    """As a softmax of two, whose bits do not depend on an element's place in memory."""
    finite = logits.clamp(-1e4, 1e4)
    return torch.stack((finite, torch.zeros_like(finite)), dim=-1).softmax(dim=-1)[..., 0]


def _not_among_best(values: Tensor, num_best: int) -> Tensor:
    """True [T, G] for all but each row's best, ties to the lowest index."""
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    left_out = torch.ones_like(order, dtype=torch.bool)
    return left_out.scatter_(1, order[:, :num_best], False)


def sort_pairs(
    experts: Tensor,
    num_experts: int,
    slots: Tensor,
    tokens_per_tile: int,
    *,
    weights: Tensor | None = None,
    pair_weight: Tensor | None = None,
) -> tuple[PairGroups, Tensor, Tensor]:
    """Pairs of experts [T, K], by expert, then token: groups, pair_row [P], pair_index [T, K].

    Group e holds the pairs of expert e, whose weight is slot `slots`[e]. `pair_row` is each pair's
    token, `pair_index` where each pair went, both int32. Where it is given, `pair_weight` fp32 [P]
    is written with the `weights` [T, K] of the sorted pairs.
    """
    flat = experts.flatten().long()
    order = torch.argsort(flat, stable=True)
    pair_index = torch.empty_like(order, dtype=torch.int32)
    pair_index[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    counts = torch.bincount(flat, minlength=num_experts)
    tiles = (counts + tokens_per_tile - 1) // tokens_per_tile
    group = torch.arange(num_experts, dtype=torch.int32, device=order.device)
    groups = PairGroups(
        slots=slots,
        offsets=_first_of_each(counts),
        tile_offsets=_first_of_each(tiles),
        tile_groups=group.repeat_interleave(tiles),
        tokens_per_tile=tokens_per_tile,
        num_pairs=len(order),
    )
    if pair_weight is not None:
        assert weights is not None, "pair_weight comes with weights"
        pair_weight.copy_(weights.flatten()[order])
    return groups, (order // experts.shape[1]).int(), pair_index.view_as(experts)


def sort_chunks(
    experts: Tensor, num_experts: int, chunks: Sequence[slice]
) -> tuple[Tensor, Tensor]:
    """Sort each chunk of experts [T, K] by itself: where its experts begin, where its pairs went.

    Chunks follow each other and have all tokens. First pairs int32 [C, E + 1], indices [T, K].
    """
    slots = torch.arange(num_experts, dtype=torch.int32, device=experts.device)
    parts = [sort_pairs(experts[chunk], num_experts, slots, BLOCK_ROWS) for chunk in chunks]
    offsets = torch.stack([groups.offsets for groups, _, _ in parts])
    return offsets, torch.cat([pair_index for _, _, pair_index in parts])


def _first_of_each(counts: Tensor) -> Tensor:
    """0 and the running sums, int32 [len(counts) + 1]."""
    borders = counts.new_zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(counts, dim=0, dtype=torch.int32, out=borders[1:])
    return borders


def route_tokens(
    hidden: Tensor | None,
    router_weight: Tensor | None,
    num_experts_per_token: int,
    *,
    slots: Tensor,
    tokens_per_tile: int,
    logits: Tensor | None = None,
    renormalize: bool,
    scale: float = 1.0,
    num_groups: int = 1,
    num_groups_per_token: int = 1,
    scoring: Scoring = "softmax",
    bias: Tensor | None = None,
    pair_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, PairGroups, Tensor, Tensor]:
    """topk_gate, then sort_pairs: experts, weights, groups, pair_row, pair_index."""
    experts, weights = topk_gate(
        hidden,
        router_weight,
        num_experts_per_token,
        logits=logits,
        renormalize=renormalize,
        scale=scale,
        num_groups=num_groups,
        num_groups_per_token=num_groups_per_token,
        scoring=scoring,
        bias=bias,
    )
    pairs = sort_pairs(
        experts, len(slots), slots, tokens_per_tile, weights=weights, pair_weight=pair_weight
    )
    return experts, weights, *pairs


def permute(rows: Tensor, row_index: Tensor) -> Tensor:
    """Pack rows in the order they are sent: [R, D], [N] -> [N, D]."""
    return rows.index_select(0, row_index)


def permute_int8(rows: Tensor, row_index: Tensor) -> tuple[Tensor, Tensor]:
    """Rows for the wire, one scale a row: [R, D], [N] -> int8 [N, D], scales fp32 [N].

    A scale is the row's largest magnitude / 127; a value is the element * (127 / magnitude), to the
    nearest, ties to even. A row whose elements are all under 1e-30 has scale 0. A row with an
    element that is not finite has scale NaN: it comes back as NaN.
    """
    picked = permute(rows, row_index).float()
    magnitude = picked.abs().amax(dim=-1)
    magnitude = torch.where(magnitude.isfinite(), magnitude, float("nan"))
    # Divided as tensors: with a number torch multiplies by its reciprocal on a GPU.
    steps = torch.full_like(magnitude, 127.0)
    is_zero = magnitude < 1e-30
    inverse = torch.where(is_zero, 0.0, steps / magnitude)
    values = (picked * inverse[:, None]).round().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return values.to(torch.int8), torch.where(is_zero, 0.0, magnitude / steps)


FP8_GROUP_SIZE = 128


def permute_fp8(
    rows: Tensor, row_index: Tensor | None = None, *, group_size: int | None = FP8_GROUP_SIZE
) -> tuple[Tensor, Tensor]:
    """Rows as e4m3: [R, D], [N] -> float8_e4m3fn [N, D], scales fp32 [N, ceil(D / group_size)].

    One scale for each `group_size` elements of a row, the last ones may be fewer; None: one for
    each row, [N]. Without `row_index` the rows stay in place. A scale is the largest magnitude /
    448; a code is the element * (448 / magnitude), to the nearest, ties to even. Elements all under
    1e-30 have scale 0. Where one is not finite, the scale and the codes are NaN.
    """
    picked = (rows if row_index is None else permute(rows, row_index)).float()
    num_rows, width = picked.shape
    size = width if group_size is None else group_size
    groups = torch.nn.functional.pad(picked, (0, -width % size)).unflatten(1, (-1, size))
    magnitude = groups.abs().amax(dim=-1)
    magnitude = torch.where(magnitude.isfinite(), magnitude, float("nan"))
    # Divided as tensors: with a number torch multiplies by its reciprocal on a GPU.
    largest = torch.full_like(magnitude, 448.0)
    is_zero = magnitude < 1e-30
    inverse = torch.where(is_zero, 0.0, largest / magnitude)
    values = groups * inverse[..., None]
    values = torch.where(values.isnan(), float("nan"), values)  # of either sign until here
    codes = values.to(torch.float8_e4m3fn).flatten(1)[:, :width].contiguous()
    scales = torch.where(is_zero, 0.0, magnitude / largest)
    return codes, scales[:, 0] if group_size is None else scales


def dequantize_rows(
    packed: Tensor, scales: Tensor, dtype: torch.dtype, row_index: Tensor | None = None
) -> Tensor:
    """Back from permute_int8: scale * value rounded to `dtype`, [R, D], [R] -> [R, D] or [N, D]."""
    rows = packed.float() * scales[:, None]
    return (rows if row_index is None else permute(rows, row_index)).to(dtype)


def grouped_gemm(
    rows: Tensor,
    weights: Tensor,
    groups: PairGroups,
    row_index: Tensor | None = None,
    *,
    swiglu: bool = False,
    pair_weight: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """Products of sorted pairs, each with its group's slot: [R, D] x [S, N, D] -> [P, N].

    `row_index` [P] names the row of each pair; without it the rows are the pairs. With `swiglu`
    the weights are gate rows, then as many up rows, and the result is silu(gate) * up [P, N / 2].
    `pair_weight` fp32 [P] multiplies a pair's result. `output` is written and returned where given.
    """
    product = rows.new_empty(groups.num_pairs, weights.shape[1])
    for slot, begin, end in _pairs_of_slots(groups):
        source = rows[begin:end] if row_index is None else permute(rows, row_index[begin:end])
        product[begin:end] = _product(source, weights[slot])
    if swiglu:
        product = _gated(product)
    if pair_weight is not None:
        product = (product.float() * pair_weight[:, None]).to(product.dtype)
    return product if output is None else output.copy_(product)


def _pairs_of_slots(groups: PairGroups) -> Iterator[tuple[int, int, int]]:
    """Each group's slot, its first pair, and the one behind its last."""
    borders = pairwise(groups.offsets.tolist())
    for slot, (begin, end) in zip(groups.slots.tolist(), borders, strict=True):
        yield slot, begin, end


class _SlotMatrices(Protocol):
    """The sizes of the matrices of S slots, in whatever numbers."""

    @property
    def num_features(self) -> int:
        """Columns of the product: N, or F with swiglu."""

    @property
    def depth(self) -> int:
        """D, the summed dimension."""

    @property
    def swiglu(self) -> bool:
        """Whether the rows are F gate rows and F up rows."""


class QuantizedMatrix(_SlotMatrices, Protocol):
    """What quant_gemm needs of the packed matrices of S slots (quant.fragments.PackedMatrix)."""

    @property
    def packed(self) -> Tensor:
        """Codes uint8 [S, N/16, D/64, 32, 16], for 8 bits [S, N/16, D/64, 2, 32, 16]."""

    @property
    def scales(self) -> Tensor:
        """One scale a group of depth, fp16 or bf16 [S, N/16, groups, 16]."""

    @property
    def zeros(self) -> Tensor | None:
        """The code of value 0 as a number, shape and dtype of scales; None: the middle code."""

    @property
    def num_bits(self) -> int:
        """4 or 8."""

    @property
    def group_size(self) -> int:
        """Elements of depth that share a scale: 32, 64 or 128."""

    def dense(self, slot: int) -> Tensor:
        """One slot's matrix [N, D] in the dtype of scales, gate rows before up rows."""


def quant_gemm(
    rows: Tensor,
    experts: QuantizedMatrix,
    groups: PairGroups,
    row_index: Tensor | None = None,
    *,
    pair_weight: Tensor | None = None,
) -> Tensor:
    """grouped_gemm with the numbers that the codes stand for: [R, D] -> [P, num_features].

    Gated (silu(gate) * up) where the matrix says swiglu.
    """
    if not groups.num_pairs:
        return rows.new_empty(0, experts.num_features)
    weights = torch.stack([experts.dense(slot).to(rows.dtype) for slot in groups.slots.tolist()])
    by_group = replace(groups, slots=torch.arange(len(weights), dtype=torch.int32))
    return grouped_gemm(
        rows, weights, by_group, row_index, swiglu=experts.swiglu, pair_weight=pair_weight
    )


@runtime_checkable
class Fp8Weights(_SlotMatrices, Protocol):
    """What fp8_gemm needs of the matrices of S slots in e4m3 (quant.fp8.Fp8Matrix)."""

    @property
    def codes(self) -> Tensor:
        """float8_e4m3fn [S, N, D]; with swiglu N = 2F, gate rows before up rows."""

    @property
    def scales(self) -> Tensor:
        """fp32 [S, blocks of 128 rows, ceil(D / 128)], gate and up blocked apart; or [S, N]."""

    @property
    def scaling(self) -> Literal["block", "channel"]:
        """Whether 128 x 128 weights share a scale, or a row."""

    def scales_by_row(self, slot: int) -> Tensor:
        """One slot's scales, those of every row: fp32 [N, ceil(D / 128)], by channels [N, 1]."""


def fp8_gemm(
    rows: Tensor,
    row_scales: Tensor,
    experts: Fp8Weights,
    groups: PairGroups,
    row_index: Tensor | None = None,
    *,
    dtype: torch.dtype,
    pair_weight: Tensor | None = None,
) -> Tensor:
    """Products of permute_fp8's rows with e4m3 weights: [R, D] -> [P, num_features] of `dtype`.

    `row_scales` are [R, ceil(D / 128)] where the weights are scaled by blocks, [R] where by
    channels. A sum over 128 of depth is exact, then rounded to fp32; by blocks it is multiplied by
    row scale * weight scale. These sums are added in fp32 in ascending depth; by channels the total
    is multiplied. Gated (silu(gate) * up) where the matrix says swiglu; rounded once, at the end.
    """
    product = rows.new_empty(groups.num_pairs, experts.codes.shape[1], dtype=torch.float32)
    numbers = rows.double()  # of which a product has 8 bits, and a sum of 128 less than 53
    for slot, begin, end in _pairs_of_slots(groups):
        source, scales = (
            part[begin:end] if row_index is None else permute(part, row_index[begin:end])
            for part in (numbers, row_scales)
        )
        product[begin:end] = _fp8_product(source, scales, experts, slot)
    if experts.swiglu:
        product = _gated(product)
    if pair_weight is not None:
        product = product * pair_weight[:, None]
    return product.to(dtype)


def _fp8_product(rows: Tensor, row_scales: Tensor, experts: Fp8Weights, slot: int) -> Tensor:
    weight_scales = experts.scales_by_row(slot).t()
    weight = experts.codes[slot].double()
    total = torch.zeros(len(rows), len(weight), device=rows.device)
    blocks = zip(rows.split(FP8_GROUP_SIZE, 1), weight.split(FP8_GROUP_SIZE, 1), strict=True)
    for block, (row_part, weight_part) in enumerate(blocks):
        partial = (row_part @ weight_part.t()).float()
        if experts.scaling == "block":
            partial *= row_scales[:, block, None] * weight_scales[block]
        total += partial
    return total if experts.scaling == "block" else total * (row_scales[:, None] * weight_scales)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of the last axis: [P, 2F] -> [P, F]."""
    return _gated(gate_up)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def combine(
    pairs: Tensor, pair_index: Tensor, weights: Tensor | None, addend: Tensor | None = None
) -> Tensor:
    """Sum of each token's weighted pairs, fp32, ascending k: [P, D], [T, K], [T, K] -> [T, D].

    Without weights the pairs are weighted already. `addend` [T, D] is added last.
    """
    num_tokens, num_experts_per_token = pair_index.shape
    total = torch.zeros(num_tokens, pairs.shape[1], dtype=torch.float32, device=pairs.device)
    for k in range(num_experts_per_token):
        pair = pairs.index_select(0, pair_index[:, k]).float()
        total += pair if weights is None else weights[:, k, None] * pair
    if addend is not None:
        total += addend
    return total.to(pairs.dtype)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019): [..., D] -> [..., D].

    hidden / sqrt(mean of its squares + epsilon) in fp32, or wider where it is; rounded, then
    multiplied with weight [D].
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    return weight * wide.to(hidden.dtype)


def add_norm(
    hidden: Tensor, addend: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """hidden + addend and its rms_norm: [T, D], [T, D] -> [T, D] each."""
    total = hidden + addend
    return total, rms_norm(total, weight, epsilon)


def rotate(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys [T, H, width] by their positions: cos and signed sin [T, 1, width]."""
    cos, sin = tables
    return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * sin


def rotary_cache(
    product: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache_rows: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    epsilon: float = 0.0,
) -> Tensor:
    """A fused product [T, (H + 2 KV heads) x width] -> its queries, rotated: [T, H, width].

    Columns are queries, keys, values. `rotary` is what `rotate` takes; keys are rotated as well.
    Keys and values go to rows `cache_rows` int64 [T] of the pages [blocks, block size, KV heads,
    width] of a layer. With `norms`, weights [width] of queries and of keys, both are rms_norm'ed
    first.
    """
    num_kv_heads, width = keys.shape[2:]
    heads = product.unflatten(1, (-1, width))
    turned, value = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    if norms is not None:
        query, key = turned[:, :-num_kv_heads], turned[:, -num_kv_heads:]
        turned = torch.cat(
            [rms_norm(query, norms[0], epsilon), rms_norm(key, norms[1], epsilon)], dim=1
        )
    turned = rotate(turned, rotary)  # [T, H + KV heads, width]
    keys.flatten(0, 1).index_copy_(0, cache_rows, turned[:, -num_kv_heads:])
    values.flatten(0, 1).index_copy_(0, cache_rows, value)
    return turned[:, :-num_kv_heads]


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Causal attention over pages [blocks, block size, KV heads, width]: [T, H, width] -> the same.

    Position p of sequence b is row p % block size of block `block_tables[b, p // block size]`
    [B, blocks]. Rows `query_starts[b]` .. `query_starts[b + 1]` [B + 1] are the sequence's last
    ones of `lengths[b]` [B] positions. A query sees what is not after it; one that sees nothing,
    or is no sequence's, gets zeros. Scores are multiplied with `scale`, None: 1 / sqrt(width).
    Computed in fp32, or wider where the query is. Query heads of one KV head lie side by side.
    """
    attended = query.new_zeros(*query.shape[:2], values.shape[3])
    starts = query_starts.tolist()
    for begin, end, length, blocks in zip(
        starts, starts[1:], lengths.tolist(), block_tables, strict=False
    ):
        if begin < end and length > 0:
            past_keys, past_values = (
                pages[blocks].flatten(0, 1)[:length] for pages in (keys, values)
            )
            attended[begin:end] = _attend(query[begin:end], past_keys, past_values, scale)
    return attended


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """The last queries of one sequence [N, H, width] over all its keys [M, KV heads, width]."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_shared = query.shape[1] // keys.shape[1]
    shared_keys, shared_values = (
        past.to(dtype).repeat_interleave(num_shared, dim=1) for past in (keys, values)
    )
    scores = torch.einsum("nhw,mhw->hnm", query.to(dtype), shared_keys)
    scores *= query.shape[2] ** -0.5 if scale is None else scale
    places = torch.arange(len(keys), device=query.device)
    seen = places <= (places.new_tensor(range(len(query))) + (len(keys) - len(query)))[:, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    attended = torch.einsum("hnm,mhw->nhw", weights, shared_values).to(query.dtype)
    return attended.masked_fill(~seen.any(dim=1)[:, None, None], 0.0)
