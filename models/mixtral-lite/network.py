"""The network as it is trained, and its export under the names of published Mixtrals.

Letters in shape comments: B sequences, S positions, D model width, F expert width, E experts,
K experts per token, H heads, C head width, L layers, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The model's sizes; the defaults are the published checkpoint."""

    vocab_size: int = 3072
    hidden_size: int = 256
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    router_aux_loss_coef: float = 0.002


@dataclass
class Routing:
    """What the router of one layer did: chosen share and mean probability, each [E]."""

    share: Tensor
    probability: Tensor


class TrainingMixtral(nn.Module):
    """Mixtral's arithmetic, laid out for training: each kind of weight is one tensor [L, ...].

    All experts are computed for all tokens as one wide SwiGLU, and the routing weight, zero for
    the experts not chosen, multiplies the inner activation. For eight experts of width 256 this
    does four times the arithmetic of a grouped product but moves no rows and has no shapes that
    depend on data, which is faster at this size and compiles whole.
    """

    cos: Tensor  # [S, C/2]
    sin: Tensor

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        layers, width, experts = shape.num_hidden_layers, shape.hidden_size, shape.num_local_experts
        inner = shape.intermediate_size
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        inside = width**-0.5
        outside = (2 * layers * width) ** -0.5  # residual branches start small

        def weight(*size: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(size) * std)

        self.embed = weight(shape.vocab_size, width, std=0.02)
        self.q_proj = weight(layers, queries, width, std=inside)
        self.k_proj = weight(layers, keys, width, std=inside)
        self.v_proj = weight(layers, keys, width, std=inside)
        self.o_proj = weight(layers, width, queries, std=outside)
        self.w1 = weight(layers, experts, inner, width, std=inside)
        self.w3 = weight(layers, experts, inner, width, std=inside)
        self.w2 = weight(layers, experts, width, inner, std=outside)
        self.gate = weight(layers, experts, width, std=0.02)
        self.norms = nn.Parameter(torch.ones(2 * layers + 1, width))
        half = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        positions = torch.arange(shape.max_position_embeddings).float()
        angles = torch.outer(positions, shape.rope_theta**-half)  # [S, C/2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def norm(self, x: Tensor, scale: Tensor) -> Tensor:
        """RMS norm in float32, result in the compute dtype. [..., D] -> [..., D]"""
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.shape.rms_norm_eps)
        return (x * scale).to(self.dtype)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding over the two halves of each head. [B, H, S, C] -> [B, H, S, C]"""
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        low, high = x.float().chunk(2, dim=-1)
        turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
        return turned.to(x.dtype)

    def attention(self, h: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
        """Causal grouped-query attention. [B, S, D] -> [B, S, D]"""
        batch, length, _ = h.shape

        def heads(weight: Tensor) -> Tensor:
            return F.linear(h, weight).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            self.rotate(heads(q)), self.rotate(heads(k)), heads(v), is_causal=True, enable_gqa=True
        )
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), o)

    def route(self, h: Tensor, gate: Tensor) -> tuple[Tensor, Routing]:
        """Mixtral's router: softmax over all, the best K, renormalised. [B, S, D] -> [B, S, E]

        The best two are found by two maxima, which compile into the neighbouring kernels where
        top-k would not. Equal float32 probabilities are not expected.
        """
        probability = F.linear(h.float(), gate.float()).softmax(-1)
        best = probability.amax(-1, keepdim=True)
        second = probability.masked_fill(probability >= best, -1).amax(-1, keepdim=True)
        chosen = probability >= second
        weights = probability * chosen
        weights = weights / weights.sum(-1, keepdim=True)
        share = chosen.float().mean((0, 1)) / self.shape.num_experts_per_tok
        return weights, Routing(share, probability.mean((0, 1)))

    def experts(self, h: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        """Every expert as a slice of one wide MLP. [B, S, D], [B, S, E] -> [B, S, D]"""
        inner = F.silu(F.linear(h, w1.flatten(0, 1))) * F.linear(h, w3.flatten(0, 1))
        inner = inner.unflatten(-1, (self.shape.num_local_experts, -1))
        inner = (inner * weights[..., None]).to(self.dtype).flatten(-2)  # [B, S, E * F]
        return F.linear(inner, w2.transpose(0, 1).flatten(1))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S] -> final states [B, S, D], expert shares [L, E], balance loss []"""
        attention = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        mlp = (self.w1, self.w2, self.w3)
        q, k, v, o, w1, w2, w3 = (p.to(self.dtype).unbind(0) for p in (*attention, *mlp))
        gates, norms = self.gate.unbind(0), self.norms.unbind(0)
        x = F.embedding(tokens, self.embed).float()
        routings: list[Routing] = []
        for n in range(self.shape.num_hidden_layers):
            x = x + self.attention(self.norm(x, norms[2 * n]), q[n], k[n], v[n], o[n])
            h = self.norm(x, norms[2 * n + 1])
            weights, routing = self.route(h, gates[n])
            x = x + self.experts(h, weights, w1[n], w2[n], w3[n])
            routings.append(routing)
        shares = torch.stack([r.share for r in routings])
        balance = (shares * torch.stack([r.probability for r in routings])).sum(-1).mean()
        scale = self.shape.num_local_experts * self.shape.num_experts_per_tok
        return self.norm(x, norms[-1]), shares, balance * scale

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S + 1] -> loss of each prediction [B * S], expert shares [L, E], balance loss []"""
        states, shares, balance = self(tokens[:, :-1])
        logits = F.linear(states, self.embed.to(self.dtype)).float().flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        return F.cross_entropy(logits, targets, reduction="none"), shares, balance


def published_tensors(model: TrainingMixtral) -> dict[str, Tensor]:
    """The weights under the names that Mixtral checkpoints use on disk; the head is tied."""
    tensors = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norms[-1]}
    for n in range(model.shape.num_hidden_layers):
        layer = f"model.layers.{n}"
        tensors[f"{layer}.input_layernorm.weight"] = model.norms[2 * n]
        tensors[f"{layer}.post_attention_layernorm.weight"] = model.norms[2 * n + 1]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{layer}.self_attn.{name}.weight"] = getattr(model, name)[n]
        moe = f"{layer}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = model.gate[n]
        for expert in range(model.shape.num_local_experts):
            for name in ("w1", "w2", "w3"):
                key = f"{moe}.experts.{expert}.{name}.weight"
                tensors[key] = getattr(model, name)[n, expert]
    return {name: t.detach().bfloat16().cpu().contiguous() for name, t in tensors.items()}


def write_json(path: Path, value: object) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def export(model: TrainingMixtral, out: Path) -> None:
    """Write model.safetensors, config.json and generation_config.json."""
    weights = out / "model.safetensors"
    save_file(published_tensors(model), weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config: dict[str, Any] = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    config |= asdict(model.shape) | ids
    config |= {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    write_json(out / "config.json", dict(sorted(config.items())))
    # A file that begins also means that the last one has ended.
    write_json(out / "generation_config.json", ids | {"eos_token_id": [2, 1], "do_sample": False})
