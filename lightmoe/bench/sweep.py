"""What `lightmoe bench` measures: the cells of the sweep, and their prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightmoe.errors import UsageError

NATURAL = "natural"
"""Routing as the gate chooses, among the names of made-up ones."""

_BOUNDS = {
    "batch_sizes": (1, 2**14),
    "prompt_lengths": (1, 2**24),
    "output_length": (2, 2**24),
    "num_repeats": (1, 1000),
    "num_warmups": (1, 1000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Every batch size with every prompt length; lengths in tokens.

    `num_warmups` runs of a cell come before the `num_repeats` that count; `output_length` tokens
    are measured while the whole batch decodes.
    """

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    prompt_lengths: tuple[int, ...] = (128, 1024)
    output_length: int = 64
    num_repeats: int = 3
    num_warmups: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if not low <= number <= high:
                    raise UsageError(f"{name} has {number}; give numbers from {low} to {high}")
            if value == ():
                raise UsageError(f"{name} is empty; give numbers such as 1,8,32")

    def cells(self) -> list[tuple[int, int]]:
        """Pairs of batch size and prompt length; small ones first."""
        lengths, sizes = sorted(set(self.prompt_lengths)), sorted(set(self.batch_sizes))
        return [(size, length) for length, size in itertools.product(lengths, sizes)]


def parse_numbers(text: str, name: str) -> tuple[int, ...]:
    """Reads "1,8,32"; raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"{name} is {text!r}; give numbers such as 1,8,32")
    return tuple(int(part) for part in parts)


class Prompts:
    """Prompts as token ids: pieces of a text where there is one, else random tokens.

    Every call gives others, so that no run finds its prompts in a cache; the same seed gives the
    same ones again.
    """

    def __init__(self, vocab_size: int, seed: int, text: Sequence[int] = ()) -> None:
        self._vocab_size = vocab_size
        self._text = text
        self._random = np.random.default_rng(seed)

    def take(self, batch_size: int, length: int) -> list[tuple[int, ...]]:
        """`batch_size` prompts of `length` tokens."""
        if not self._text:
            drawn = self._random.integers(self._vocab_size, size=(batch_size, length))
            return [tuple(prompt) for prompt in drawn.tolist()]
        if len(self._text) < length:
            raise UsageError(
                f"the text has {len(self._text)} tokens, a prompt is to have {length};"
                " give a longer text"
            )
        starts = self._random.integers(len(self._text) - length + 1, size=batch_size).tolist()
        return [tuple(self._text[start : start + length]) for start in starts]
