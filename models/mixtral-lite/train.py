"""How mixtral-lite was made: a Mixtral of about eight million weights, trained on Python source.

    prepare   on a CPU: read packages, clean and deduplicate, split, train the tokenizer, pack
    train     on one GPU: train against a clock, write the checkpoint, measure it
    check     anywhere: load the checkpoint with transformers, compare losses, write samples

This file holds the command line and the training loop. sources.py and corpus.py make the text,
tokenizer.py cuts it, network.py and optimizer.py are what is trained and how, evaluate.py measures.
The letters in shape comments are those of network.py.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import PARTS, load_corpus, prepare
from evaluate import check, exact_loss, measure_parts, windows
from network import Shape, TrainingMixtral, export, write_json
from optimizer import learning_rate_factor, make_optimizers
from tokenizer import write_tokenizer_settings
from tokenizers import Tokenizer
from torch import Tensor


def batches(tokens: Tensor, length: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled windows [B, S + 1]; each epoch shifts the grid and visits all of it once."""
    generator = torch.Generator(tokens.device).manual_seed(seed)
    steps = torch.arange(length + 1, device=tokens.device)
    num_windows = (len(tokens) - 1) // length - 1
    while True:
        shift = torch.randint(length, (1,), generator=generator, device=tokens.device)
        order = torch.randperm(num_windows, generator=generator, device=tokens.device)
        for part in order[: num_windows // size * size].view(-1, size):
            yield tokens[(part * length + shift)[:, None] + steps].long()


def run_clock(
    model: TrainingMixtral, corpus: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Train until the minutes, the epochs or the steps are used up, whichever comes first.

    The clock starts before compilation: the minutes are wall-clock minutes of this function.
    """
    optimizers = make_optimizers(model, options.muon_lr, options.adam_lr)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    step_losses = torch.compile(model.losses) if options.compile else model.losses
    size = options.batch_tokens // options.length
    per_step = size * options.length
    most_tokens = options.max_epochs * len(corpus)
    start, step, progress, log = time.perf_counter(), 0, 0.0, []
    for tokens in batches(corpus, options.length, size, options.seed):
        elapsed = (time.perf_counter() - start) / (60 * options.minutes)
        used = max(elapsed, step * per_step / most_tokens, step / options.steps)
        progress = max(progress, used)
        if progress >= 1:
            break
        for group in groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(progress)
        losses, shares, balance = step_losses(tokens)
        loss = losses.mean()
        (loss + model.shape.router_aux_loss_coef * balance).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        # Reading the loss also keeps the host from running ahead of the device and the clock.
        if step % 10 == 0 or step <= 3:
            seconds, value = time.perf_counter() - start, loss.item()
            if step % options.log_every == 0 or step <= 3:
                low, high = shares.min().item(), shares.max().item()
                log.append({"step": step, "seconds": round(seconds, 1), "loss": round(value, 4)})
                print(
                    f"step {step} {seconds:.1f}s loss {value:.4f} balance {balance.item():.3f} "
                    f"shares {low:.3f}..{high:.3f} tokens/s {step * per_step / seconds:,.0f}",
                    flush=True,
                )
    seconds = time.perf_counter() - start
    return {
        "steps": step,
        "seconds": round(seconds, 1),
        "tokens_seen": step * per_step,
        "epochs": round(step * per_step / len(corpus), 2),
        "tokens_per_second": round(step * per_step / seconds),
        "log": log,
    }


def train(options: argparse.Namespace) -> None:
    """Load the corpus, train, export, measure the exported weights."""
    began = time.perf_counter()
    torch.manual_seed(options.seed)
    on_gpu = torch.device(options.device).type == "cuda"
    arrays = load_corpus(options.data, options.workers)
    tensors = (torch.from_numpy(a.astype(np.int16)).to(options.device) for a in arrays)
    parts = dict(zip(PARTS, tensors, strict=True))
    corpus = parts["train"]
    tokenizer = Tokenizer.from_file(str(options.data / "tokenizer.json"))
    shape = Shape(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=options.length)
    model = TrainingMixtral(shape, torch.bfloat16 if on_gpu else torch.float32).to(options.device)
    num_weights = sum(p.numel() for p in model.parameters())
    loaded = round(time.perf_counter() - began, 1)
    print(f"{num_weights:,} weights, {len(corpus):,} tokens, loaded in {loaded} s", flush=True)

    metrics: dict[str, Any] = {"shape": asdict(shape), "weights": num_weights}
    metrics |= {"corpus_tokens": len(corpus), "load_seconds": loaded}
    metrics |= {"batch_tokens": options.batch_tokens, "length": options.length}
    metrics |= {"device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    metrics["training"] = run_clock(model, corpus, options)

    for p in model.parameters():  # measure what is written: bfloat16 weights
        p.data = p.data.bfloat16().float()
    options.out.mkdir(parents=True, exist_ok=True)
    export(model, options.out)
    metrics |= measure_parts(model, parts, tokenizer, options)
    if on_gpu:
        metrics["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    sample = (options.data / "heldout.txt").read_text()
    ids = tokenizer.encode(sample, add_special_tokens=False).ids
    text = windows(torch.tensor(ids, device=options.device), options.length)
    metrics["heldout_txt_loss"] = exact_loss(model, text)
    metrics["total_seconds"] = round(time.perf_counter() - began, 1)
    write_json(options.out / "metrics.json", metrics)
    for name in ("tokenizer.json", "heldout.txt"):
        (options.out / name).write_bytes((options.data / name).read_bytes())
    write_tokenizer_settings(options.out, shape.max_position_embeddings)


def parse() -> argparse.Namespace:
    """The options of the three commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)

    p = commands.add_parser("prepare", help="build the corpus and the tokenizer")
    p.set_defaults(run=prepare)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--site", type=Path, nargs="+", required=True, help="site-packages folders")
    p.add_argument("--stdlib", type=Path, nargs="+", required=True, help="Lib folders, new first")
    p.add_argument("--stdlib-version", required=True, help="their versions, for the manifest")
    p.add_argument("--source-megabytes", type=float, default=13, help="at most, from one package")
    p.add_argument("--held-share", type=float, default=0.01)
    p.add_argument("--tokenizer-share", type=float, default=0.15)
    p.add_argument("--vocab-size", type=int, default=Shape.vocab_size)
    p.add_argument("--sample-bytes", type=int, default=120_000)
    p.add_argument("--workers", type=int, default=os.cpu_count())

    t = commands.add_parser("train", help="train and export")
    t.set_defaults(run=train)
    t.add_argument("--data", type=Path, required=True, help="what prepare wrote")
    t.add_argument("--out", type=Path, required=True)
    t.add_argument("--device", default="cuda")
    t.add_argument("--minutes", type=float, default=8)
    t.add_argument("--max-epochs", type=float, default=8)
    t.add_argument("--steps", type=int, default=10**9)
    t.add_argument("--length", type=int, default=Shape.max_position_embeddings)
    t.add_argument("--batch-tokens", type=int, default=65_536)
    t.add_argument("--muon-lr", type=float, default=0.01)
    t.add_argument("--adam-lr", type=float, default=3e-3)
    t.add_argument("--eval-tokens", type=int, default=2_000_000)
    t.add_argument("--log-every", type=int, default=200)
    t.add_argument("--seed", type=int, default=0)
    t.add_argument("--workers", type=int, default=os.cpu_count())
    t.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)

    c = commands.add_parser("check", help="load with transformers, compare, sample")
    c.set_defaults(run=check)
    c.add_argument("--model", type=Path, required=True)
    c.add_argument("--device", default="cpu")
    c.add_argument("--new-tokens", type=int, default=120)
    return parser.parse_args()


def main() -> None:
    """Run the command asked for."""
    options = parse()
    options.run(options)


if __name__ == "__main__":
    main()
