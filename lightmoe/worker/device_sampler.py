"""Tokens for a whole batch from logits that stay on their device.

The same choice as sampler.py, in integers: probabilities are counted in units of 2^-40 of the
largest, so their sums are exact in any order, and a row's token does not depend on the batch, on
which a device's floating sums may.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightmoe.core import SamplingStep
from lightmoe.worker.inputs import send
from lightmoe.worker.sampler import INVALID_TOKEN, uniform

_UNITS = float(1 << 40)


def stays_on_device(step: SamplingStep) -> bool:
    """Whether a step needs nothing but its row: no history, bans, or log-probabilities."""
    return step.num_logprobs < 0 and not step.history and not step.banned_ids


def best_rows(logits: Tensor) -> Tensor:
    """The likeliest token for each row of fp32 logits [B, V], INVALID_TOKEN as below: int64 [B]."""
    return _if_finite(logits, logits.argmax(dim=1))


def sample_rows(logits: Tensor, steps: Sequence[SamplingStep]) -> Tensor:
    """One token for each row of fp32 logits [B, V], INVALID_TOKEN where they are not finite.

    int64 [B], where the logits are, without waiting for them.
    """
    tokens = logits.argmax(dim=1)
    if any(step.temperature > 0 for step in steps):
        fields = [
            (step.temperature, step.top_k, step.top_p, step.min_p, uniform(step), _filters(step))
            for step in steps
        ]
        columns = send(torch.tensor(fields, dtype=torch.float64), logits.device)
        temperature, top_k, top_p, min_p, point, filters = columns.t()[:, :, None]
        mass = _mass(logits, temperature)
        drawn = _draw(mass, point)
        if any(_filters(step) for step in steps):
            best = mass.sort(dim=1, descending=True, stable=True)
            place = _draw(_kept(best.values, top_k, top_p, min_p), point)
            drawn = torch.where(filters > 0, best.indices.gather(1, place), drawn)
        tokens = torch.where(temperature > 0, drawn, tokens[:, None]).squeeze(1)
    return _if_finite(logits, tokens)


def _if_finite(logits: Tensor, tokens: Tensor) -> Tensor:
    # What is not finite leaves no sum finite, whatever it meets on the way.
    finite = logits.sum(dim=1).abs() < torch.inf
    return torch.where(finite, tokens, INVALID_TOKEN)


def _filters(step: SamplingStep) -> bool:
    return step.top_k > 0 or step.top_p < 1.0 or step.min_p > 0.0


def _mass(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities as integers [B, V]. A temperature near zero must sharpen, not overflow."""
    wide = logits.double()
    scaled = (wide - wide.amax(dim=1, keepdim=True)) / temperature.clamp(min=1e-5)
    return (scaled.exp() * _UNITS).long()


def _kept(best: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Mass in descending order with 0 for what the filters leave out."""
    place = torch.arange(best.shape[1], device=best.device)
    best = best * ((top_k <= 0) | (place < top_k))
    before = best.cumsum(dim=1) - best
    best = best * (before < top_p * best.sum(dim=1, keepdim=True))
    return best * (best >= min_p * best[:, :1])


def _draw(mass: Tensor, point: Tensor) -> Tensor:
    """Where the share `point` of each row's mass is reached: [B, V], [B, 1] -> [B, 1]."""
    heaped = mass.cumsum(dim=1)
    total = heaped[:, -1:]
    # The product may round up to the total, which no entry exceeds.
    target = torch.minimum((point * total).long(), total - 1)
    return torch.searchsorted(heaped, target, right=True).clamp(max=mass.shape[1] - 1)
