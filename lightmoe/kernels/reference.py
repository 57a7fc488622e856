"""Each kernel in plain PyTorch: the specification of the CUDA kernels, and what runs without them.

Row-invariant: the arithmetic of a row never depends on how many rows stand beside it. A matrix
product picks its summation order by its number of rows, so products run in zero-padded blocks of
BLOCK_ROWS rows: the same shape, so the same order, for every row.

Shapes: T tokens, D model width, F expert width, E experts, K experts per token, R rows, P pairs,
S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ROWS = 16


def matmul(rows: Tensor, weight: Tensor) -> Tensor:
    """Row-invariant `rows @ weight.T`: [R, D] x [N, D] -> [R, N]."""
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


def topk_gate(
    hidden: Tensor,
    router_weight: Tensor,
    num_experts_per_token: int,
    *,
    renormalize: bool,
    scale: float = 1.0,
    num_groups: int = 1,
    num_groups_per_token: int = 1,
) -> tuple[Tensor, Tensor]:
    """Choose experts: [T, D] x [E, D] -> experts int64 [T, K], weights fp32 [T, K].

    Softmax over all experts in fp32, the K best in descending order, ties to the lowest index;
    `renormalize` divides the K weights by their sum (Mixtral), `scale` multiplies them
    (DeepSeek's routed_scaling_factor). The logits are computed in the dtype of `router_weight`.

    With more than one group (DeepSeek-V2's group_limited_greedy) experts count in `num_groups`
    equal groups of neighbours; only the `num_groups_per_token` groups with the best single expert
    take part, ties to the lowest group. They need to hold K experts.
    """
    scores = matmul(hidden.to(router_weight.dtype), router_weight).float().softmax(dim=-1)
    if num_groups_per_token < num_groups:
        scores = _keep_best_groups(scores, num_groups, num_groups_per_token)
    best = torch.sort(scores, dim=-1, descending=True, stable=True)
    weights = best.values[:, :num_experts_per_token]
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return best.indices[:, :num_experts_per_token].contiguous(), weights * scale


def _keep_best_groups(scores: Tensor, num_groups: int, num_groups_per_token: int) -> Tensor:
    """Scores [T, E] with -1, less than any score, in all but each token's best groups."""
    grouped: Tensor = scores.unflatten(1, (num_groups, -1))
    order = torch.sort(grouped.amax(dim=-1), dim=-1, descending=True, stable=True).indices
    left_out = torch.ones_like(order, dtype=torch.bool)
    left_out.scatter_(1, order[:, :num_groups_per_token], False)
    return grouped.masked_fill(left_out[:, :, None], -1.0).flatten(1)


def permute(rows: Tensor, row_index: Tensor) -> Tensor:
    """Pack rows in the order they are sent: [R, D], [N] -> [N, D]."""
    return rows.index_select(0, row_index)


def grouped_gemm(
    rows: Tensor,
    weights: Tensor,
    slots: list[int],
    pairs_per_slot: list[int],
    row_index: Tensor | None = None,
) -> Tensor:
    """Products of rows sorted by slot with each slot's weight: [R, D] x [S, N, D] -> [P, N].

    `slots` names the slots that have pairs, `pairs_per_slot` says how many each has, in the order
    of the pairs. `row_index` [P] gathers the row of each pair; without it the rows are the pairs.
    """
    num_pairs = sum(pairs_per_slot)
    product = rows.new_empty(num_pairs, weights.shape[1])
    begin = 0
    for slot, count in zip(slots, pairs_per_slot, strict=True):
        end = begin + count
        source = rows[begin:end] if row_index is None else permute(rows, row_index[begin:end])
        product[begin:end] = matmul(source, weights[slot])
        begin = end
    return product


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of the last axis: [P, 2F] -> [P, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def combine(pairs: Tensor, pair_index: Tensor, weights: Tensor) -> Tensor:
    """Sum of each token's weighted pairs, fp32, ascending k: [P, D], [T, K], [T, K] -> [T, D]."""
    num_tokens, num_experts_per_token = pair_index.shape
    total = torch.zeros(num_tokens, pairs.shape[1], dtype=torch.float32, device=pairs.device)
    for k in range(num_experts_per_token):
        total += weights[:, k, None] * pairs.index_select(0, pair_index[:, k]).float()
    return total.to(pairs.dtype)
