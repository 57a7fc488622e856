"""What the weights are worth: held-out loss, expert load, samples, agreement with transformers."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from network import Shape, TrainingMixtral
from tokenizer import BOS, EOS, PAD
from tokenizers import Tokenizer
from torch import Tensor

PROMPTS = (
    "def fibonacci(n):",
    "class Stack:\n    def __init__(self):",
    "import os\n",
    "for i in range(",
    "def is_prime(n):\n    ",
    "def read_json(path):\n",
)
TEMPERATURES = (0.0, 0.2, 0.8)


def windows(tokens: Tensor, length: int, limit: int = 4 * 2048) -> Tensor:
    """The first windows of a text, not overlapping in what they predict -> [N, S + 1]"""
    count = min((len(tokens) - 1) // length, max(1, limit // length))
    starts = torch.arange(count, device=tokens.device) * length
    return tokens[starts[:, None] + torch.arange(length + 1, device=tokens.device)].long()


def spread_windows(tokens: Tensor, length: int, limit: int) -> Tensor:
    """Windows from all over a text, about limit tokens together -> [N, S + 1]"""
    every = windows(tokens, length, len(tokens))
    return every[:: max(1, len(every) * length // limit)]


@torch.no_grad()
def measure(
    model: TrainingMixtral, text: Tensor, byte_lengths: Tensor, batch: int
) -> tuple[dict[str, float], Tensor]:
    """Loss over windows [N, S + 1], and the share of tokens of each expert [L, E]."""
    nats, num_bytes, tokens = 0.0, 0.0, 0
    shares = torch.zeros_like(model.gate[..., 0])
    for part in text.split(batch):
        losses, share, _ = model.losses(part)
        nats += losses.double().sum().item()
        num_bytes += byte_lengths[part[:, 1:]].double().sum().item()
        tokens += losses.numel()
        shares += share * losses.numel()
    metrics = {
        "tokens": tokens,
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "bytes_per_token": num_bytes / tokens,
    }
    return metrics, shares / tokens


def measure_parts(
    model: TrainingMixtral,
    parts: dict[str, Tensor],
    tokenizer: Tokenizer,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Measure every part of the corpus; write the expert load on the held-out files."""
    byte_lengths = token_byte_lengths(tokenizer).to(options.device)
    batch = max(1, options.batch_tokens // options.length // 2)
    found: dict[str, Any] = {}
    for name, tokens in parts.items():
        cut = spread_windows if name == "train" else windows
        text = cut(tokens, options.length, options.eval_tokens)
        found[name], shares = measure(model, text, byte_lengths, batch)
        print(name, {key: round(value, 4) for key, value in found[name].items()}, flush=True)
        if name == "held_files":
            write_expert_load(options.out / "expert_load.json", shares, found[name]["tokens"])
            found["expert_load"] = [[round(s, 4) for s in layer] for layer in shares.tolist()]
    return found


def token_byte_lengths(tokenizer: Tokenizer) -> Tensor:
    """How many bytes of text each token stands for -> float32 [V]; special tokens stand for none.

    The byte-level alphabet writes one character per byte, so a token's length is its byte count.
    """
    lengths = torch.zeros(tokenizer.get_vocab_size())
    for token, number in tokenizer.get_vocab().items():
        lengths[number] = 0 if token in (PAD, BOS, EOS) else len(token)
    return lengths


def write_expert_load(path: Path, shares: Tensor, tokens: int) -> None:
    """Per layer, the share of (token, expert) pairs that each expert received on held-out text."""
    value = {
        "text": "held-out files",
        "tokens": tokens,
        "experts_per_token": Shape.num_experts_per_tok,
        "shares": [[round(share, 6) for share in layer] for layer in shares.tolist()],
    }
    path.write_text(re.sub(r"\s+(?=[\d.\]]+,?\n)", " ", json.dumps(value, indent=1)) + "\n")


@torch.no_grad()
def exact_loss(model: TrainingMixtral, text: Tensor) -> float:
    """The float32 loss of a few windows [N, S + 1], for `check` to compare with."""
    dtype, model.dtype = model.dtype, torch.float32
    losses, _, _ = model.losses(text)
    model.dtype = dtype
    return losses.double().mean().item()


def check(options: argparse.Namespace) -> None:
    """Load the folder with transformers; compare its loss; write samples.txt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder: Path = options.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = checked_ids(folder, tokenizer)
    compare_loss(folder, model, torch.tensor(ids, device=options.device))
    text = samples(model, tokenizer, options.new_tokens)
    (folder / "samples.txt").write_text(text)
    print(text)


def checked_ids(folder: Path, tokenizer: Any) -> list[int]:
    """heldout.txt as token ids, without <bos>, after comparing the two tokenizers on it."""
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = (folder / "heldout.txt").read_text()
    bos, *ids = raw.encode(text).ids
    if tokenizer(text, verbose=False)["input_ids"] != [bos, *ids] or raw.decode(ids) != text:
        raise SystemExit("transformers cuts or restores the held-out text differently")
    return ids


def compare_loss(folder: Path, model: Any, ids: Tensor) -> None:
    """The loss of the transformers model must be what the training code saw."""
    tokens = windows(ids, model.config.max_position_embeddings)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.flatten(0, 1)
    loss = F.cross_entropy(logits, tokens[:, 1:].flatten()).item()
    expected = json.loads((folder / "metrics.json").read_text())["heldout_txt_loss"]
    print(f"float32 loss: transformers {loss:.6f}, training model {expected:.6f}")
    if not abs(loss - expected) < 2e-4:
        raise SystemExit("the exported checkpoint does not compute what was trained")


def samples(model: Any, tokenizer: Any, num_tokens: int) -> str:
    """Continuations of every prompt, greedy and sampled."""
    lines: list[str] = []
    torch.manual_seed(0)
    for prompt, temperature in itertools.product(PROMPTS, TEMPERATURES):
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
        answer = model.generate(**inputs, max_new_tokens=num_tokens, **sampling)[0]
        shown = tokenizer.decode(answer, skip_special_tokens=True)
        lines += [f"=== temperature {temperature}: {prompt!r}", str(shown), ""]
    return "\n".join(lines)
