"""Whether a wheel gets kernels, and the settings of scikit-build-core that follow from it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import build

Settings = dict[str, str | list[str]]
ARCHITECTURES = "cmake.define.LIGHTMOE_CUDA_ARCHITECTURES"
TOOLCHAIN = "cmake.define.LIGHTMOE_TOOLCHAIN"


def architectures(settings: Settings | None) -> str:
    """The architectures to build for: those given, else those of the cards here; "" for none."""
    given = (settings or {}).get(ARCHITECTURES)
    if given is not None:
        return "" if given == "none" else str(given)
    has_compiler = shutil.which(os.environ.get("CXX", "c++")) is not None
    return ",".join(build.cards()) if has_compiler else ""


def complete(settings: Settings | None) -> Settings:
    """The settings, with those that a wheel with kernels needs: its tag, and the toolchain."""
    chosen = {**(settings or {}), ARCHITECTURES: architectures(settings)}
    if not chosen[ARCHITECTURES]:
        return chosen
    chosen |= {"wheel.platlib": "true", "wheel.py-api": ""}
    found = importlib.util.find_spec("pybind11")
    if found is not None and found.origin is not None:  # all of it was installed for this build
        chosen.setdefault(TOOLCHAIN, str(Path(found.origin).parents[1]))
    return chosen
