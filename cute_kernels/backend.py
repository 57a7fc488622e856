"""The build backend of the package: scikit-build-core, with kernels where they can be used.

A wheel holds compiled kernels when the machine that builds it has an NVIDIA card and a C++
compiler, or when it is told for which architectures:

    pip install . -C cmake.define.LIGHTMOE_CUDA_ARCHITECTURES=75,90      (or none)

Only then is it bound to this platform and this Python, and only then is a compiler fetched. With a
C++ compiler alone it holds the route of CPU ranks, for this platform and every Python 3
(LIGHTMOE_HOST_ROUTE=OFF leaves it out); without one it is of pure Python. Editable installs have
that route, too, and take the kernels that `make kernels` builds.
"""

from __future__ import annotations

import scikit_build_core.build as wrapped
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
)

import toolchain
import wheel_settings
from wheel_settings import Settings

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    """What the build needs: with kernels, also their compiler and headers."""
    wheels = toolchain.WHEELS if wheel_settings.architectures(config_settings) else ()
    return [*wrapped.get_requires_for_build_wheel(config_settings), *wheels]


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings | None = None
) -> str:
    """The metadata, with the tag that `build_wheel` will give."""
    settings = wheel_settings.complete(config_settings)
    return wrapped.prepare_metadata_for_build_wheel(metadata_directory, settings)


def build_wheel(
    wheel_directory: str,
    config_settings: Settings | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build the wheel; returns its file name."""
    settings = wheel_settings.complete(config_settings)
    return wrapped.build_wheel(wheel_directory, settings, metadata_directory)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Settings | None = None
) -> str:
    """The metadata, with the tag that `build_editable` will give."""
    settings = wheel_settings.with_host_route(config_settings)
    return wrapped.prepare_metadata_for_build_editable(metadata_directory, settings)


def build_editable(
    wheel_directory: str,
    config_settings: Settings | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build the wheel of an editable install; returns its file name."""
    settings = wheel_settings.with_host_route(config_settings)
    return wrapped.build_editable(wheel_directory, settings, metadata_directory)
