"""What tests on a GPU ask of the card."""

from __future__ import annotations

import torch


def half_dtypes() -> list[str]:
    """Names of the 16-bit dtypes of the card here; of any card where there is none."""
    turing = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
    return ["float16"] if turing else ["float16", "bfloat16"]
