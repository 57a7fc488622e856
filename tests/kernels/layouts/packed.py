"""Where the codes of packed weights (lightmoe/quant/fragments.py) go, as numbers."""

from __future__ import annotations

import numpy as np
import torch

from lightmoe.quant.fragments import pack_weight


def packed_positions(num_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and depth [32 lanes, 4 steps, 4 registers, 2] of a block, read as the kernel reads it.

    The codes of a few packed matrices are the digits of each element's number.
    """
    number = torch.arange(16 * 64).view(16, 64)
    position = np.zeros((32, 4, 4, 2), dtype=np.int64)
    for shift in range(0, 12, num_bits):
        codes = (number >> shift & (1 << num_bits) - 1).to(torch.uint8)
        ones = torch.ones(16, 1, dtype=torch.float16)
        packed = pack_weight(codes, ones, None, num_bits, 64).packed.numpy()[0, 0, 0]
        position += _digits(packed, num_bits).astype(np.int64) << shift
    return position // 64, position % 64


def _digits(packed: np.ndarray, num_bits: int) -> np.ndarray:
    if num_bits == 8:  # [2, 32, 16]: half of the depth, lane, (step, word, register, lo and hi)
        return packed.reshape(2, 32, 2, 4, 2).transpose(1, 0, 2, 3, 4).reshape(32, 4, 4, 2)
    words = packed.view("<u4")  # [32, 4 steps]
    pairs = np.stack([words >> 4 * register & 0x000F000F for register in range(4)], axis=-1)
    return np.stack([pairs & 0xFFFF, pairs >> 16], axis=-1)
