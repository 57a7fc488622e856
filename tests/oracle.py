"""What transformers answers on models/mixtral-lite: the tokens and logits that ours must equal.

Twenty pieces of Python, from one token to more than any step's budget, 64 tokens each.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightmoe.server.tokenizer import Tokenizer

MIXTRAL_LITE = Path(__file__).resolve().parents[1] / "models" / "mixtral-lite"
NUM_TOKENS = 64

_SNIPPETS = [
    "def",
    "import os\n",
    "def fibonacci(n):",
    "for i in range(10):\n    print(",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def is_prime(n):\n    if n < 2:\n        return False\n    for",
    "with open(path, 'rb') as file:\n    data = ",
    'if __name__ == "__main__":\n',
    "import unittest\n\nclass TestSort(unittest.TestCase):\n    def test_empty(self):\n",
    "try:\n    value = int(text)\nexcept ValueError:\n",
    'def read_lines(path):\n    """Return the lines of a file, without their ends."""\n',
    "x = [i * i for i in range(100) if i % 3 == 0]\ny = {",
    "def binary_search(items, wanted):\n    low, high = 0, len(items)\n    while low < high:\n",
    "from collections import defaultdict\n\ncounts = defaultdict(int)\nfor word in text.split():\n",
    "async def fetch(session, url):\n    async with session.get(url) as response:\n",
    "# Prüfung: Größe ändern 漢字 😀\nname = 'Grüße'\n",
    "@dataclass(frozen=True)\nclass Point:\n    x: float\n    y: float = 0.0\n\n    def __add__",
    "def merge_sort(items):\n    if len(items) <= 1:\n        return items\n"
    "    middle = len(items) // 2\n    left = merge_sort(items[:middle])\n",
]


@dataclass(frozen=True)
class Answers:
    """For every prompt, greedy tokens [64] and the logits [64, V] that each was chosen from."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[np.ndarray]


def greedy_answers(model: PreTrainedModel, prompts: list[list[int]], num_tokens: int) -> Answers:
    """Greedy tokens with the model's cache, no end of text; logits of one pass over all of it."""
    tokens, logits = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            whole = model.generate(
                ids,
                # Told so, since a prompt may hold the padding token.
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            chosen_from = model(whole).logits[0, len(prompt) - 1 : -1]
        tokens.append(whole[0, len(prompt) :].tolist())
        logits.append(chosen_from.numpy())
    return Answers(prompts, tokens, logits)


@functools.cache
def mixtral_lite_answers() -> Answers:
    """Computed once for all tests of a session."""
    tokenizer = Tokenizer.from_folder(MIXTRAL_LITE)
    assert tokenizer is not None
    long = inspect.getsource(textwrap)
    texts = [*_SNIPPETS, long[:1000], long[2000:4000]]
    prompts = [tokenizer.encode(text) for text in texts]
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MIXTRAL_LITE, dtype=torch.float32)
    return greedy_answers(model, prompts, NUM_TOKENS)
