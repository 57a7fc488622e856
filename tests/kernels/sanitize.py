"""Launches every built tile of the matrix stems once, on small sizes, and checks what it computes.

For compute-sanitizer on a machine with a GPU, from the checkout:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        --kernel-name kns=_gemm_ python -m tests.kernels.sanitize
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.kernels.library import FOLDER, read_manifest
from lightmoe.kernels.tiles import Tile
from lightmoe.quant.fragments import PackedMatrix
from lightmoe.quant.packing import QuantizedExpertLayout
from tests.kernels.pairs import (
    AMPERE,
    MOST_ERROR,
    NATIVE,
    TURING,
    Pairs,
    Road,
    on_road,
    only_tile,
    random_slots,
    sort_experts,
    tiles_of,
)

NUM_TOKENS, NUM_EXPERTS, PER_TOKEN, NUM_SLOTS = 37, 3, 2, 4
WIDTH, EXPERT_WIDTH = 136, 200  # no multiples of 64
PACKED_WIDTH, PACKED_EXPERT_WIDTH = 192, 128
SPLITS = (1, 2)
MAX_CTAS = 2  # several units for a CTA


def main() -> int:
    """Run what the command line asks for; 1 where an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", default="16,8,4", help="of the weights: 16 is grouped_gemm")
    arguments = parser.parse_args()
    manifest = read_manifest(FOLDER)
    assert manifest is not None, "make kernels"
    roads = [*NATIVE, Road(torch.float16, TURING), Road(torch.bfloat16, AMPERE)]
    built = {None, *manifest.kernels}
    num_launches, wrong, start = 0, 0, time.monotonic()
    for road in (road for road in roads if road.architecture in built):
        with on_road(road):
            for num_bits in map(int, arguments.bits.split(",")):
                for error in launch_all(road, num_bits):
                    num_launches += 1
                    wrong += not error <= MOST_ERROR[road.dtype]
        print(f"{road}: {num_launches} launches, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{wrong} of {num_launches} are wrong")
    return int(wrong > 0)


def launch_all(road: Road, num_bits: int) -> Iterator[float]:
    """The relative errors of both products of a layer by each tile, whole and split."""
    generator = torch.Generator().manual_seed(0)
    weights = plain_weights(road) if num_bits == 16 else packed_weights(road, num_bits)
    experts = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).argsort(dim=1)
    experts = experts[:, :PER_TOKEN].contiguous()
    slots = random_slots(NUM_EXPERTS, NUM_SLOTS).cpu()
    pair_weight = torch.rand(NUM_TOKENS * PER_TOKEN, generator=generator)
    for operand, dense, swiglu in weights:
        rows = torch.randn(NUM_TOKENS, dense.shape[2], generator=generator).to(road.dtype)
        for tile in tiles_of(road.dtype, num_bits):
            pairs = sort_experts(experts, slots, tile.tokens)
            expected = product_on_host(rows, dense, pairs, pair_weight, swiglu=swiglu)
            for splits in (1,) if tile.limit else SPLITS:
                actual = launch(rows, operand, pairs, pair_weight, tile, splits, swiglu=swiglu)
                error = (actual.double() - expected).norm() / expected.norm()
                if not error <= MOST_ERROR[road.dtype]:
                    what = "swiglu" if swiglu else "plain"
                    print(f"{road} int{num_bits} {tile.name} {what} {splits=}: {error:.1e}")
                yield float(error)


def launch(
    rows: Tensor,
    operand: Tensor | PackedMatrix,
    pairs: Pairs,
    pair_weight: Tensor,
    tile: Tile,
    splits: int,
    *,
    swiglu: bool,
) -> Tensor:
    """The product by one tile, back on the host."""
    groups = pairs.groups
    on_gpu = type(groups)(
        groups.slots.cuda(),
        groups.offsets.cuda(),
        groups.tile_offsets.cuda(),
        groups.tile_groups.cuda(),
        groups.tokens_per_tile,
        groups.num_pairs,
    )
    arguments = (on_gpu, pairs.row_index.cuda())
    mode = {"pair_weight": pair_weight.cuda(), "max_ctas": MAX_CTAS, "deterministic": False}
    with only_tile(tile, splits):
        if isinstance(operand, Tensor):
            product = kernels.grouped_gemm(rows.cuda(), operand, *arguments, swiglu=swiglu, **mode)
        else:
            product = kernels.quant_gemm(rows.cuda(), operand, *arguments, **mode)
    return product.cpu()


def product_on_host(
    rows: Tensor, dense: Tensor, pairs: Pairs, pair_weight: Tensor, *, swiglu: bool
) -> Tensor:
    """The weighted product in float64, of dense weights [S, N, D]."""
    borders = pairs.groups.offsets.tolist()
    parts = [
        rows[pairs.row_index[borders[group] : borders[group + 1]]].double()
        @ dense[slot].double().t()
        for group, slot in enumerate(pairs.groups.slots.tolist())
    ]
    product = torch.cat(parts)
    if swiglu:
        gate, up = product.chunk(2, dim=1)
        product = torch.nn.functional.silu(gate) * up
    return product * pair_weight.double()[:, None]


Weights = Iterator[tuple[Tensor | PackedMatrix, Tensor, bool]]


def plain_weights(road: Road) -> Weights:
    """(on the GPU, on the host, whether gated) of both matrices of a layer."""
    for num_rows, depth, swiglu in (
        (2 * EXPERT_WIDTH, WIDTH, True),
        (WIDTH, EXPERT_WIDTH, False),
    ):
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(NUM_SLOTS, num_rows, depth, generator=generator) * depth**-0.5
        weights = weights.to(road.dtype)
        yield weights.cuda(), weights, swiglu


def packed_weights(road: Road, num_bits: int) -> Weights:
    """The same of quantised experts, with scales of 32 and zero points, the most that there is."""
    layout = QuantizedExpertLayout(
        PACKED_WIDTH, PACKED_EXPERT_WIDTH, num_bits, 32, symmetric=False, dtype=road.dtype
    )
    blobs = torch.zeros(NUM_SLOTS, layout.num_elements, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1)
    for blob in blobs:
        gate_up = torch.randn(2 * PACKED_EXPERT_WIDTH, PACKED_WIDTH, generator=generator)
        down = torch.randn(PACKED_WIDTH, PACKED_EXPERT_WIDTH, generator=generator)
        scale = PACKED_WIDTH**-0.5
        layout.write(blob, *(gate_up * scale).chunk(2), down * PACKED_EXPERT_WIDTH**-0.5)
    matrices = zip(layout.views(blobs), layout.views(blobs.cuda()), strict=True)
    for on_host, on_gpu in matrices:
        dense = torch.stack([on_host.dense(slot) for slot in range(NUM_SLOTS)])
        yield on_gpu, dense, on_gpu.swiglu


if __name__ == "__main__":
    sys.exit(main())
