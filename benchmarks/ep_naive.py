"""The layer that anyone writes first: torch's all_to_all_single and grouped_mm, no overlap."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ep_ranks import Shape
from torch import Tensor


def init(rank: int, num_ranks: int, port: int, device: torch.device) -> None:
    """Join torch's own NCCL group."""
    dist.init_process_group(
        "nccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=num_ranks,
        device_id=device,
    )


class NaiveLayer:
    """E / W experts a rank, one copy of each; gate_up [E/W, 2F, D], down [E/W, D, F]."""

    def __init__(self, shape: Shape, router: Tensor, gate_up: Tensor, down: Tensor) -> None:
        self.shape, self.router = shape, router
        self.gate_up, self.down = gate_up.transpose(1, 2), down.transpose(1, 2)
        self.num_ranks = dist.get_world_size()

    def __call__(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        scores = F.softmax(hidden @ self.router.T, dim=-1, dtype=torch.float32)
        weights, experts = scores.topk(self.shape.per_token, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        counts = torch.bincount(experts.flatten(), minlength=self.shape.num_experts)
        rows, received = self._dispatch(hidden[order // self.shape.per_token], counts)
        here = len(self.gate_up)
        expert = torch.arange(here, device=hidden.device).repeat(self.num_ranks)
        expert = expert.repeat_interleave(received, output_size=len(rows))
        by_expert = expert.argsort(stable=True)
        results = self._experts(rows[by_expert], received.view(-1, here).sum(0))
        back = torch.empty_like(results)
        back[by_expert] = results
        returned = hidden.new_empty(len(order), hidden.shape[1])
        dist.all_to_all_single(returned, back, self.sent, self.got)
        output = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        weighted = returned * weights.flatten()[order][:, None]
        output.index_add_(0, order // self.shape.per_token, weighted.float())
        return output.to(hidden.dtype)

    def _dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts)
        both = torch.stack([counts, received]).view(2, self.num_ranks, -1).sum(2).tolist()
        self.sent, self.got = both
        arrived = rows.new_empty(sum(self.got), rows.shape[1])
        dist.all_to_all_single(arrived, rows, self.got, self.sent)
        return arrived, received

    def _experts(self, rows: Tensor, per_expert: Tensor) -> Tensor:
        ends = per_expert.cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(rows, self.gate_up, offs=ends).chunk(2, dim=-1)
        return torch._grouped_mm(F.silu(gate) * up, self.down, offs=ends)


class GatheredLayer(NaiveLayer):
    """All-gather of every token, this rank's experts on all of them, reduce-scatter of the sums."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        everyone = hidden.new_empty(self.num_ranks * len(hidden), hidden.shape[1])
        dist.all_gather_into_tensor(everyone, hidden)
        scores = F.softmax(everyone @ self.router.T, dim=-1, dtype=torch.float32)
        weights, experts = scores.topk(self.shape.per_token, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        here = len(self.gate_up)
        local = experts.flatten() - dist.get_rank() * here
        local = torch.where((local >= 0) & (local < here), local, here)
        order = local.argsort(stable=True)
        counts = torch.bincount(local, minlength=here + 1)[:here]
        order = order[: int(counts.sum())]
        token = order // self.shape.per_token
        results = self._experts(everyone[token], counts)
        sums = everyone.new_zeros(everyone.shape)
        sums.index_add_(0, token, (results * weights.flatten()[order][:, None]).to(sums.dtype))
        output = torch.empty_like(hidden)
        dist.reduce_scatter_tensor(output, sums)
        return output
