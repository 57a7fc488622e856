"""Light-MoE serves Mixture-of-Experts language models, experts spread over any number of ranks.

The public names load on first use, so `import lightmoe` stays quick: no torch, no ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightmoe.client import AsyncClient, Client
    from lightmoe.core import SamplingParams
    from lightmoe.llm import LLM

__version__ = "0.1.0"

__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams", "__version__"]

_MODULES = {
    "LLM": "lightmoe.llm",
    "AsyncClient": "lightmoe.client",
    "Client": "lightmoe.client",
    "SamplingParams": "lightmoe.core",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
