"""Whether a wheel gets kernels and the compiled route of CPU ranks, and the settings of
scikit-build-core that follow from it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import build

Settings = dict[str, str | list[str]]
ARCHITECTURES = "cmake.define.LIGHTMOE_CUDA_ARCHITECTURES"
HOST_ROUTE = "cmake.define.LIGHTMOE_HOST_ROUTE"
TOOLCHAIN = "cmake.define.LIGHTMOE_TOOLCHAIN"


def architectures(settings: Settings | None) -> str:
    """The architectures to build for: those given, else those of the cards here; "" for none."""
    given = (settings or {}).get(ARCHITECTURES)
    if given is not None:
        return "" if given == "none" else str(given)
    return ",".join(build.cards()) if has_compiler() else ""


def has_compiler() -> bool:
    """Whether there is a C++ compiler here."""
    return shutil.which(os.environ.get("CXX", "c++")) is not None


def complete(settings: Settings | None) -> Settings:
    """The settings of a wheel: what is in it, the tag that follows, and the toolchain."""
    chosen = with_host_route({**(settings or {}), ARCHITECTURES: architectures(settings)})
    if not chosen[ARCHITECTURES]:
        return chosen
    chosen |= {"wheel.platlib": "true", "wheel.py-api": ""}
    found = importlib.util.find_spec("pybind11")
    if found is not None and found.origin is not None:  # all of it was installed for this build
        chosen.setdefault(TOOLCHAIN, str(Path(found.origin).parents[1]))
    return chosen


def with_host_route(settings: Settings | None) -> Settings:
    """The settings, with the route of CPU ranks where it can be compiled: for any Python 3 here."""
    chosen: Settings = {HOST_ROUTE: "ON" if has_compiler() else "OFF", **(settings or {})}
    return chosen | {"wheel.platlib": "true"} if chosen[HOST_ROUTE] == "ON" else chosen
