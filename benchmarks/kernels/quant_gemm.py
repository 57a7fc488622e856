"""quant_gemm on its own: int4 and int8 experts, gate and up (1) and down (2), tiles as chosen.

python benchmarks/kernels/quant_gemm.py [--shapes mixtral] [--tokens 64] [--arch 75ptx]
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
    experts = case.packed[index]
    tokens_per_tile = kernels.tokens_per_tile(
        experts,
        len(case.output),
        len(case.counts),
        swiglu=case.swiglu,
        deterministic=deterministic,
    )
    groups = pair_groups(case, tokens_per_tile)
    return lambda: kernels.quant_gemm(
        case.rows[index], experts, groups, case.pair_row, deterministic=deterministic
    )


if __name__ == "__main__":
    sys.exit(run("quant_gemm", ("int4", "int8"), call, __doc__))
