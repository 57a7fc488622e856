"""Record what mixtral-lite's routers choose on text, with a change of subject in the middle.

    python benchmarks/record_routing.py --output tests/data/routing-mixtral-lite.npz

The first half of the steps is held-out Python; the second is prose of this repository in English
and Chinese. Every rank reads its own piece of the text, `--tokens-per-rank` tokens a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightmoe.balancer.trace import TraceWriter

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "mixtral-lite"
PYTHON = [MODEL / "heldout.txt"]
PROSE = [ROOT / name for name in ("LICENSE", "README.zh-CN.md", "models/mixtral-lite/README.md")]
CONTEXT_TOKENS = 1024


def main() -> None:
    """Run the model over both texts and write the trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=10)
    parser.add_argument("--tokens-per-rank", type=int, default=32)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    texts = [
        np.concatenate([tokenizer.encode(path.read_text(encoding="utf-8")) for path in paths])
        for paths in (PYTHON, PROSE)
    ]
    per_step = options.gpus * options.tokens_per_rank
    num_steps = min(len(text) for text in texts) // per_step
    config = model.config
    with TraceWriter(
        options.output,
        config.num_hidden_layers,
        config.num_local_experts,
        config.num_experts_per_tok,
    ) as writer:
        for half, text in enumerate(texts):
            experts = chosen(model, text[: num_steps * per_step], options.gpus)
            for step in range(num_steps):
                tokens = experts[:, step * options.tokens_per_rank :][:, : options.tokens_per_rank]
                writer.add(
                    half * num_steps + step,
                    tokens.reshape(-1, *tokens.shape[2:]),
                    np.repeat(np.arange(options.gpus), options.tokens_per_rank),
                )
    print(f"{options.output}: {2 * num_steps} steps of {per_step} tokens")


@torch.inference_mode()
def chosen(model: torch.nn.Module, tokens: Sequence[int], num_ranks: int) -> np.ndarray:
    """The experts of every token, each rank reading its own piece: uint16 [W, T, L, K]."""
    pieces = torch.as_tensor(np.asarray(tokens).reshape(num_ranks, -1))
    num_per_token = model.config.num_experts_per_tok
    parts = []
    for begin in range(0, pieces.shape[1], CONTEXT_TOKENS):
        window = pieces[:, begin : begin + CONTEXT_TOKENS]
        logits = model(window, output_router_logits=True, logits_to_keep=1).router_logits
        best = torch.stack(logits).topk(num_per_token, dim=-1).indices
        best = best.reshape(len(logits), *window.shape, num_per_token)
        parts.append(best.permute(1, 2, 0, 3).numpy().astype(np.uint16))
    return np.concatenate(parts, axis=1)


if __name__ == "__main__":
    main()
