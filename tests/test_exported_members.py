"""The public names of the package are a list on purpose, and cost nothing until one is used."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import lightmoe


def test_exported_members() -> None:
    assert lightmoe.__all__ == ["LLM", "AsyncClient", "Client", "SamplingParams", "__version__"]
    assert set(lightmoe.__all__) <= set(dir(lightmoe))


@pytest.mark.parametrize("name", [name for name in lightmoe.__all__ if name != "__version__"])
def test_member_is_the_class_of_that_name(name: str) -> None:
    assert getattr(lightmoe, name).__name__ == name


def test_version_is_the_installed_one() -> None:
    assert lightmoe.__version__ == importlib.metadata.version("lightmoe")


def test_unknown_member() -> None:
    with pytest.raises(AttributeError, match="'lightmoe' has no attribute 'Model'"):
        _ = lightmoe.Model


@pytest.mark.parametrize("module", ["lightmoe", "lightmoe.cli", "lightmoe.client"])
def test_import_loads_nothing_heavy(module: str) -> None:
    heavy = {"torch", "ray", "transformers", "matplotlib"}
    script = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
