"""Norms, products and rotary positions. All row-invariant: kernels/reference.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from lightmoe import kernels
from lightmoe.layers.yarn import Yarn


class Linear:
    """hidden @ weight.T, weight [N, D], no bias.

    With `swiglu` the weight is gate rows, then up rows, and the result silu(gate) * up [T, N / 2].
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        swiglu: bool = False,
        output_float32: bool = False,
        deterministic: bool = True,
    ) -> None:
        self._weight = weight
        self._swiglu = swiglu
        self._output_float32 = output_float32
        self._deterministic = deterministic

    def __call__(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, N]."""
        return kernels.matmul(
            hidden,
            self._weight,
            swiglu=self._swiglu,
            output_float32=self._output_float32,
            deterministic=self._deterministic,
        )


class HeadLinear:
    """A product of its own for each head: weights [H, N, D]."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights.contiguous()
        self.num_heads, _, self.input_width = weights.shape

    def __call__(self, heads: Tensor) -> Tensor:
        """[T, H, D] -> [T, H, N]."""
        num_tokens = len(heads)
        # One token's heads would be a view, and its rows not packed.
        by_head = heads.transpose(0, 1).contiguous().flatten(0, 1)  # [H x T, D]
        products = kernels.grouped_gemm(
            by_head, self._weights, kernels.equal_groups(self._weights, num_tokens)
        )
        by_token: Tensor = products.unflatten(0, (self.num_heads, num_tokens)).transpose(0, 1)
        return by_token


class RMSNorm:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), in fp32."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        self.weight = weight
        self.epsilon = epsilon

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if hidden.is_cuda and hidden.dtype != torch.float32:
            # One launch in place of eight; the weight is applied before the rounding.
            return rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)
        return kernels.rms_norm(hidden, self.weight, self.epsilon)

    def of_sum(self, hidden: Tensor, addend: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden + addend and its norm: [T, D] -> [T, D] each; None adds nothing."""
        if addend is None:
            return hidden, self(hidden)
        return kernels.add_norm(hidden, addend, self.weight, self.epsilon)


class Rotary:
    """Rotary position embedding (Su et al. 2021), halves rotated as in Hugging Face's models."""

    def __init__(
        self,
        head_dim: int,
        theta: float,
        num_positions: int,
        device: torch.device,
        yarn: Yarn | None = None,
    ) -> None:
        powers = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        frequencies = 1.0 / theta**powers
        scale = 1.0
        if yarn is not None:
            frequencies = frequencies * torch.tensor(yarn.stretch(head_dim, theta), device=device)
            scale = yarn.table_scale
        angles = torch.outer(torch.arange(num_positions, device=device).float(), frequencies)
        # kernels.rotate subtracts the second half of the heads from the first.
        cos, sin = angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=-1)
        self._table = torch.stack([cos, sin], dim=1) * scale  # [positions, 2, head_dim]

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin of each token's position, once a step: [T, 1, head_dim] each."""
        cos, sin = self._table.index_select(0, positions).to(dtype).split(1, dim=1)
        return cos, sin


def halves_from_pairs(heads: Tensor) -> Tensor:
    """Even columns first, odd ones after: [..., D] -> [..., D].

    DeepSeek rotates columns 2i and 2i + 1 together, kernels.rotate i and i + D/2. Reordered alike,
    queries and keys have the same products.
    """
    pairs: Tensor = heads.unflatten(-1, (-1, 2))
    return pairs.transpose(-1, -2).flatten(-2)
