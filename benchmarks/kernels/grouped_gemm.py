"""grouped_gemm on its own: gate and up with gather and SwiGLU (1), down (2), tiles as chosen.

python benchmarks/kernels/grouped_gemm.py [--shapes mixtral] [--tokens 4096] [--arch 75ptx]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from operators import pair_groups, run
from products import Case
from torch import Tensor

from lightmoe import kernels


def call(case: Case, index: int, deterministic: bool) -> Callable[[], Tensor]:
    """The operator on one set of inputs."""
    weights = case.matrix(index)
    tokens_per_tile = kernels.tokens_per_tile(
        weights,
        len(case.output),
        len(weights),
        swiglu=case.swiglu,
        deterministic=deterministic,
    )
    groups = pair_groups(case, tokens_per_tile)
    return lambda: kernels.grouped_gemm(
        case.rows[index],
        weights,
        groups,
        case.pair_row,
        swiglu=case.swiglu,
        deterministic=deterministic,
    )


if __name__ == "__main__":
    sys.exit(run("grouped_gemm", ("bf16",), call, __doc__))
