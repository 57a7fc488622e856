"""The optimizers: Muon for the matrices, AdamW for the rest, and the learning rate over time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from network import TrainingMixtral
from torch import Tensor, nn


def orthogonalised(update: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix with all singular values near one, by Newton-Schulz. [..., R, C]

    Quintic iteration in bfloat16; the coefficients push small singular values up fast and leave
    the result between about 0.7 and 1.2, which is close enough for a direction.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = update.shape[-2] <= update.shape[-1]
    x: Tensor = update.bfloat16() if wide else update.bfloat16().mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised: for stacks of weight matrices [..., R, C]."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no loss to evaluate
        """One step of all groups, in place."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(torch.lerp(p.grad, average, group["momentum"]))
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(
    model: TrainingMixtral, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices; AdamW for the embedding, the routers and the norms."""
    m = model
    matrices = [m.q_proj, m.k_proj, m.v_proj, m.o_proj, m.w1, m.w2, m.w3]
    vectors = [
        {"params": [m.embed, m.norms], "lr": adam_lr},
        {"params": [m.gate], "lr": adam_lr / 4},  # fast routers send all to one expert
    ]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, muon_lr, decay=0.05),
        torch.optim.AdamW(vectors, betas=(0.9, 0.97), weight_decay=0.0, fused=True),
    ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def learning_rate_factor(progress: float, warm_up: float = 0.02, hold: float = 0.35) -> float:
    """Of the peak: a linear rise, a plateau, then a linear fall that reaches zero at the end."""
    if progress < warm_up:
        return progress / warm_up + 0.01
    return min(1.0, max(0.0, (1 - progress) / (1 - hold)))
