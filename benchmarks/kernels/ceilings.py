"""What the card itself reaches, measured in the run it is compared with: reads, copies, the
library's matrix product, and each matrix instruction that our kernels issue.

    python benchmarks/kernels/ceilings.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from compiled import kernel
from timing import time_graph
from torch import Tensor

STREAM_BYTES = 2 << 30
MATMUL_SIZE = 8192
FIRST_WITH_FP8 = 89
SETTLE_SECONDS = 0.15  # long enough for the clocks under load
# instruction -> FLOPs of one, smallest compute capability
INSTRUCTIONS = {
    "half_k8": (2 * 16 * 8 * 8, 75),
    "half_k8_half": (2 * 16 * 8 * 8, 75),
    "half_k16": (2 * 16 * 8 * 16, 80),
    "bfloat_k16": (2 * 16 * 8 * 16, 80),
}
WARP_TILES = ((2, 4), (4, 4), (4, 8))
LAUNCHES = ((128, 1), (256, 1), (128, 2), (256, 2))  # threads per CTA, CTAs per SM


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second and FLOP per second of one card, as measured.

    `instruction` names m16n8k8 and m16n8k16 of mma.sync: half_k8 and half_k16 sum fp16 products in
    fp32, bfloat_k16 bf16 products in fp32, half_k8_half fp16 products in fp16.
    """

    device: str
    capability: int
    num_sms: int
    l2_bytes: int
    read: float
    copy: float
    matmul: dict[str, float]
    instruction: dict[str, float]

    @property
    def bandwidth(self) -> float:
        """The better of reading and copying, in bytes per second."""
        return max(self.read, self.copy)

    def rate(self, instruction: str) -> float:
        """FLOP per second of an instruction of `instruction`, or of wgmma_fp16, _bf16 and _fp8.

        These are what the library's product issues on Hopper: its rate, power limit included.
        """
        library_dtype = instruction.removeprefix("wgmma_")
        return self.matmul.get(library_dtype) or self.instruction[instruction]

    def summary(self) -> str:
        """One line to print."""
        rates = {name: f"{rate / 1e12:.0f}" for name, rate in self.instruction.items()}
        products = {name: f"{rate / 1e12:.0f}" for name, rate in self.matmul.items()}
        return (
            f"{self.device}: read {self.read / 1e12:.2f} TB/s, copy {self.copy / 1e12:.2f} TB/s, "
            f"matmul {products} TFLOP/s, mma.sync {rates} TFLOP/s"
        )

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def measure() -> Ceilings:
    """All ceilings of the current card, in about two seconds."""
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = 10 * card.major + card.minor
    dtypes = {"fp16": torch.float16} | ({"bf16": torch.bfloat16} if capability >= 80 else {})
    return Ceilings(
        device=card.name,
        capability=capability,
        num_sms=card.multi_processor_count,
        l2_bytes=card.L2_cache_size,
        read=read_rate(card.multi_processor_count),
        copy=copy_rate(),
        matmul={name: matmul_rate(dtype) for name, dtype in dtypes.items()}
        | ({"fp8": fp8_matmul_rate()} if capability >= FIRST_WITH_FP8 else {}),
        instruction={
            name: instruction_rate(name, card.multi_processor_count)
            for name, (_, least) in INSTRUCTIONS.items()
            if capability >= least
        },
    )


def read_rate(num_sms: int) -> float:
    """Bytes per second of the best of several launches that read a large buffer once."""
    words = torch.randint(-(2**31), 2**31, (STREAM_BYTES // 4,), dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    read = kernel("read_rate.cu", "read_all")

    def call(num_ctas: int) -> Callable[[], object]:
        return lambda: read(num_ctas, 512, words, STREAM_BYTES // 16, sink)

    best = max(STREAM_BYTES / _seconds(call(num_sms * ctas)) for ctas in (1, 2, 4, 8, 16))
    return max(best, STREAM_BYTES / _seconds(lambda: words.sum(dtype=torch.int32)))


def copy_rate() -> float:
    """Bytes read plus bytes written, per second: the better of the driver's copy and a kernel's."""
    source = torch.randint(-(2**31), 2**31, (STREAM_BYTES // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    calls = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return max(2 * STREAM_BYTES / _seconds(call) for call in calls)


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP per second of the library's product of two random square matrices, the second one as
    it is or transposed; short runs, so that it is the clock before the power limit that counts."""
    left = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=dtype)
    right = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=dtype)
    out = torch.empty_like(left)

    def call(matrix: Tensor) -> Callable[[], object]:
        return lambda: torch.mm(left, matrix, out=out)

    best = min(_seconds(call(matrix), 0.02) for matrix in (right, right.t()))
    return 2 * MATMUL_SIZE**3 / best


def fp8_matmul_rate() -> float:
    """matmul_rate in e4m3, scaled as a whole, to bf16."""
    left, right = (
        torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda").to(torch.float8_e4m3fn)
        for _ in range(2)
    )
    one = torch.ones((), device="cuda")

    def call() -> Tensor:
        return torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16)

    return 2 * MATMUL_SIZE**3 / _seconds(call, 0.02)


def instruction_rate(name: str, num_sms: int) -> float:
    """FLOP per second of one mma.sync instruction, sustained: the best of several warp tiles."""
    flops, _ = INSTRUCTIONS[name]
    dtype = torch.bfloat16 if name.startswith("bfloat") else torch.float16
    operands = torch.randn(2 * 1024 * 1024, device="cuda", dtype=dtype)
    sink = torch.empty(num_sms * 512, dtype=torch.int32, device="cuda")
    best, best_call, best_flops = 0.0, None, 0
    for rows, columns in WARP_TILES:
        rate_kernel = kernel("mma_rate.cu", f"rate_{name}_{rows}x{columns}")
        for threads, ctas_per_sm in LAUNCHES:
            num_warps = num_sms * ctas_per_sm * threads // 32
            # the same FLOPs for every setting, a few milliseconds of a large card
            num_rounds = max(1, int(1e12 / (num_warps * 2 * rows * columns * flops)))
            call_flops = num_warps * num_rounds * 2 * rows * columns * flops

            def call(
                launch: Callable[..., None] = rate_kernel,
                shape: tuple[int, int] = (num_sms * ctas_per_sm, threads),
                num_rounds: int = num_rounds,
            ) -> None:
                launch(*shape, operands, sink, num_rounds)

            rate = call_flops / _seconds(call, 0.01)
            if rate > best:
                best, best_call, best_flops = rate, call, call_flops
    assert best_call is not None
    return max(best, best_flops / _seconds(best_call, SETTLE_SECONDS))


def _seconds(call: Callable[[], object], seconds: float = 0.03) -> float:
    return time_graph([call], seconds).ms / 1e3


def main() -> None:
    """Print this card's ceilings as JSON."""
    argparse.ArgumentParser(description=__doc__, allow_abbrev=False).parse_args()
    print(json.dumps(measure().to_json(), indent=1))


if __name__ == "__main__":
    main()
