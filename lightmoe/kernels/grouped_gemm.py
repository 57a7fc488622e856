"""Products of sorted pairs with each group's own weight, by liblight_ops."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lightmoe.kernels.checks import (
    HALF_DTYPES,
    require_aligned,
    require_cuda,
    require_dtype,
    require_half,
    require_multiple,
    require_rows,
    require_shape,
)
from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.library import Library, address, library
from lightmoe.kernels.permute import permute
from lightmoe.kernels.products import (
    GroupFields,
    Plan,
    check_groups,
    check_rows,
    group_fields,
    plan_product,
    split_scratch,
    unit_ticket,
)

_STEM = "grouped_gemm"
_FEATURE_MULTIPLE = 8
_MOST_PLANS = 1024
_CLAIMED_PAIRS = 4096
"""From so many pairs on CTAs have several tiles each, and claim them: 3 % faster on an H100."""


def grouped_gemm(
    rows: Tensor,
    weights: Tensor,
    groups: PairGroups,
    row_index: Tensor | None = None,
    *,
    swiglu: bool = False,
    pair_weight: Tensor | None = None,
    max_ctas: int | None = None,
    deterministic: bool = True,
    groups_settled: bool = False,
    expected: tuple[int, int] | None = None,
    output: Tensor | None = None,
    output_rows: Tensor | None = None,
) -> Tensor:
    """[R, D] x [S, N, D] -> [P, N], with `swiglu` [P, N / 2]; rounded once, from fp32 sums.

    `max_ctas` bounds the multiprocessors that are used, None: all; where it is given, or pairs are
    many, those that other kernels hold at first take fewer tiles. With `groups_settled` the tables
    of `groups` are older than the kernel in front of this one, and weights are fetched while that
    still runs: neither may be what it writes. `expected` pairs and groups choose the tile where
    those of `groups` are only bounds. `output` is written and returned where given. `output_rows`
    int64 [P] are addresses in memory that the device reaches: row p goes to that of pair p instead,
    and what is returned has no rows, [0, N]. UsageError names the tensor that does not fit. The
    rest is reference.grouped_gemm's.
    """
    return GroupedProduct(weights, swiglu=swiglu, deterministic=deterministic)(
        rows,
        groups,
        row_index,
        pair_weight=pair_weight,
        max_ctas=max_ctas,
        groups_settled=groups_settled,
        expected=expected,
        output=output,
        output_rows=output_rows,
    )


class GroupedProduct:
    """grouped_gemm with weights [S, N, D] that stay: for rows alike it checks and plans once.

    The layers of a step have rows alike, chunk by chunk.
    """

    def __init__(
        self, weights: Tensor, *, swiglu: bool = False, deterministic: bool = True
    ) -> None:
        self._weights = weights
        self._swiglu = swiglu
        self._deterministic = deterministic
        self._plans: dict[tuple[object, ...], tuple[Library, Plan]] = {}

    def __call__(
        self,
        rows: Tensor,
        groups: PairGroups,
        row_index: Tensor | None = None,
        *,
        pair_weight: Tensor | None = None,
        max_ctas: int | None = None,
        groups_settled: bool = False,
        expected: tuple[int, int] | None = None,
        output: Tensor | None = None,
        output_rows: Tensor | None = None,
    ) -> Tensor:
        """The product of rows [R, D], with grouped_gemm's options."""
        weights, num_pairs = self._weights, groups.num_pairs
        sizes = (num_pairs, groups.slots.shape[0], groups.tokens_per_tile, expected)
        form = (rows.shape, rows.stride(), rows.dtype, row_index is None, sizes)
        planned = self._plans.get(form)
        if planned is None:
            self._check(rows, None if row_index is not None else num_pairs)
        require_aligned(_STEM, "rows", rows)
        check_groups(_STEM, groups, row_index, pair_weight)
        require_cuda(
            _STEM,
            rows=rows,
            weights=weights,
            slots=groups.slots,
            offsets=groups.offsets,
            row_index=row_index,
            pair_weight=pair_weight,
            output_rows=output_rows,
        )
        num_features = self._num_features
        if output_rows is not None:
            require_shape(_STEM, "output_rows", output_rows, num_pairs)
            require_dtype(_STEM, "output_rows", output_rows, torch.int64)
            output = self._no_rows
        elif output is None:
            output = rows.new_empty(num_pairs, num_features)
        else:
            require_shape(_STEM, "output", output, num_pairs, num_features)
            require_dtype(_STEM, "output", output, rows.dtype)
        if not num_pairs:
            return output
        if planned is None or planned[0] is not library():
            planned = self._plan(form, sizes)
        plan = planned[1]
        if plan.permutes and row_index is not None:
            # The groups may have fewer pairs than there can be: those behind have no row.
            pair_count = groups.offsets[-1:]
            rows = permute(rows, row_index, row_count=pair_count, max_ctas=max_ctas)
            row_index, groups_settled = None, True
        launch_product(
            group_fields(groups),
            plan,
            rows,
            weights,
            output,
            row_index=row_index,
            pair_weight=pair_weight,
            output_rows=output_rows,
            swiglu=self._swiglu,
            max_ctas=max_ctas,
            groups_settled=groups_settled,
        )
        return output

    @functools.cached_property
    def _num_features(self) -> int:
        return self._weights.shape[1] // (2 if self._swiglu else 1)

    @functools.cached_property
    def _no_rows(self) -> Tensor:
        """What is returned where rows go to addresses: [0, N]."""
        return self._weights.new_empty(0, self._num_features)

    def _check(self, rows: Tensor, num_rows: int | None) -> None:
        """UsageError unless rows [num_rows, D] and the weights fit each other."""
        weights = self._weights
        require_shape(_STEM, "weights", weights, None, None, None)
        require_shape(_STEM, "rows", rows, None, weights.shape[2])
        require_half(_STEM, "rows", rows)
        check_rows(_STEM, rows, num_rows)
        check_weights(_STEM, "weights", weights, rows.dtype, swiglu=self._swiglu)

    def _plan(
        self, form: tuple[object, ...], sizes: tuple[int, int, int, tuple[int, int] | None]
    ) -> tuple[Library, Plan]:
        """The plan for rows of a form that was found to fit; kept."""
        num_pairs, num_groups, tokens_per_tile, expected = sizes
        plan = plan_weights(
            self._weights,
            num_pairs,
            num_groups,
            swiglu=self._swiglu,
            deterministic=self._deterministic,
            tokens_per_tile=tokens_per_tile,
            expected=expected,
        )
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        self._plans[form] = (library(), plan)
        return self._plans[form]


def check_weights(
    stem: str, name: str, weights: Tensor, dtype: torch.dtype, *, swiglu: bool
) -> None:
    """UsageError unless the kernels take these weights [..., N, D]."""
    require_dtype(stem, name, weights, dtype)
    require_multiple(stem, name, weights, -2, _FEATURE_MULTIPLE * (2 if swiglu else 1))
    require_rows(stem, name, weights)


def plan_weights(
    weights: Tensor,
    num_pairs: int,
    num_groups: int,
    *,
    swiglu: bool,
    deterministic: bool,
    tokens_per_tile: int | None = None,
    expected: tuple[int, int] | None = None,
) -> Plan:
    """The plan for products with these weights [..., N, D] on their device."""
    return plan_product(
        weights.device,
        weights.dtype,
        num_pairs,
        num_groups,
        weights.shape[-2] // (2 if swiglu else 1),
        weights.shape[-1],
        swiglu=swiglu,
        deterministic=deterministic,
        tokens_per_tile=tokens_per_tile,
        expected=expected,
    )


def launch_product(
    groups: GroupFields,
    plan: Plan,
    rows: Tensor,
    weights: Tensor,
    output: Tensor,
    *,
    swiglu: bool,
    row_index: Tensor | None = None,
    pair_weight: Tensor | None = None,
    output_rows: Tensor | None = None,
    max_ctas: int | None = None,
    groups_settled: bool = False,
) -> None:
    """Enqueue the kernel. Everything has been checked."""
    device = rows.device
    split_sums, split_tickets = split_scratch(plan, device)
    # Who bounds the CTAs has other kernels beside them, which make some of them start late.
    claims = max_ctas is not None or groups[-1] >= _CLAIMED_PAIRS
    ticket = unit_ticket(device) if claims and plan.tile.limit else None
    library().launch(
        _STEM,
        device,
        groups=groups,
        tile=plan.tile_fields,
        dtype=HALF_DTYPES[rows.dtype],
        rows=address(rows),
        pair_row=address(row_index),
        weights=address(weights),
        slot_bytes=weights.stride(0) * weights.element_size(),
        pair_weight=address(pair_weight),
        output=0 if output_rows is not None else address(output),
        output_rows=address(output_rows),
        depth=rows.shape[1],
        num_features=output.shape[1],
        swiglu=swiglu,
        output_float32=output.dtype == torch.float32,
        max_ctas=max_ctas or 0,
        groups_settled=groups_settled,
        unit_ticket=address(ticket),
        split_sums=address(split_sums),
        split_tickets=address(split_tickets),
        depth_splits=plan.depth_splits,
    )
