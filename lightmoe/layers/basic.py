"""Norms, products and embeddings. All row-invariant: see kernels/reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe import kernels


class Linear:
    """hidden @ weight.T, weight [N, D], no bias."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, N]."""
        return kernels.matmul(hidden, self._weight)


class RMSNorm:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), in fp32."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        self._weight = weight
        self._epsilon = epsilon

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self._epsilon)
        return self._weight * wide.to(hidden.dtype)


class Rotary:
    """Rotary position embedding (Su et al. 2021), halves rotated as in Hugging Face's models."""

    def __init__(
        self, head_dim: int, theta: float, num_positions: int, device: torch.device
    ) -> None:
        powers = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        angles = torch.outer(
            torch.arange(num_positions, device=device).float(), 1.0 / theta**powers
        )
        angles = torch.cat([angles, angles], dim=-1)
        self._cos = angles.cos()  # [positions, head_dim]
        self._sin = angles.sin()

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of each token's position, once a step: [T, 1, head_dim] each."""
        return self._cos[positions, None].to(dtype), self._sin[positions, None].to(dtype)


def rotate(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys [T, H, head_dim] by their positions."""
    cos, sin = tables
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin
