"""The files of the package agree: dependencies and pins, model folders and CMake, make."""

from __future__ import annotations

import importlib
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

STACKS = {"cpu": [], "cuda12": ["cuda12"], "cuda13": ["cuda13"]}


@pytest.fixture
def project(checkout: Path) -> dict:
    return tomllib.loads((checkout / "pyproject.toml").read_text())["project"]


def read_pins(path: Path) -> dict[str, str]:
    """Name -> version of a constraints file and of those it includes."""
    pins = {}
    for line in path.read_text().splitlines():
        if line.startswith("-c "):
            pins |= read_pins(path.parent / line.removeprefix("-c "))
        elif line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    return pins


@pytest.mark.parametrize("stack", STACKS)
def test_every_dependency_is_pinned_within_its_range(
    checkout: Path, project: dict, stack: str
) -> None:
    pins = read_pins(checkout / "constraints" / f"{stack}.txt")
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["test"] + extras["plot"]
    wanted += [requirement for extra in STACKS[stack] for requirement in extras[extra]]
    for requirement in map(Requirement, wanted):
        pin = pins.get(canonicalize_name(requirement.name), "no pin")
        assert pin in requirement.specifier, f"{requirement} is not met by {pin} of {stack}.txt"


@pytest.mark.parametrize(
    ("stack", "torch"), [("cpu", "2.13.0"), ("cuda12", "2.10.0"), ("cuda13", "2.15.0")]
)
def test_torch_of_each_stack(checkout: Path, stack: str, torch: str) -> None:
    assert read_pins(checkout / "constraints" / f"{stack}.txt")["torch"] == torch


def test_cmake_and_gitignore_name_the_same_models(checkout: Path) -> None:
    cmake = (checkout / "CMakeLists.txt").read_text()
    listed = set(re.search(r"CONFIG_ONLY_MODELS ([^)]*)\)", cmake)[1].split()) | {"mixtral-lite"}
    ignored = (checkout / ".gitignore").read_text()
    assert listed == set(re.findall(r"^!/models/([\w.-]+)/$", ignored, flags=re.MULTILINE))
    assert [
        name for name in listed if not (checkout / "models" / name / "config.json").is_file()
    ] == []


@pytest.fixture
def wheel_settings(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(checkout / "cute_kernels")
    return importlib.import_module("wheel_settings")


@pytest.mark.parametrize(
    ("cards", "compiler", "given", "expected"),
    [
        ([], "sh", None, ""),
        (["75"], "sh", None, "75"),
        (["75", "90"], "sh", None, "75,90"),
        (["75"], "no-such-compiler", None, ""),
        (["75"], "sh", "none", ""),
        ([], "sh", "80,90", "80,90"),
    ],
)
def test_a_wheel_has_kernels_where_there_is_a_card_or_one_asks(
    wheel_settings: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    cards: list[str],
    compiler: str,
    given: str | None,
    expected: str,
) -> None:
    monkeypatch.setattr(wheel_settings.build, "cards", lambda: cards)
    monkeypatch.setenv("CXX", compiler)
    settings = {} if given is None else {wheel_settings.ARCHITECTURES: given}
    complete = wheel_settings.complete(settings)
    assert complete[wheel_settings.ARCHITECTURES] == expected
    assert complete.get("wheel.platlib") == ("true" if compiler == "sh" else None)
    assert complete.get("wheel.py-api") == ("" if expected else None)


@pytest.mark.parametrize(
    ("compiler", "given", "expected"),
    [("sh", None, "ON"), ("no-such-compiler", None, "OFF"), ("sh", "OFF", "OFF")],
)
def test_the_route_of_cpu_ranks_is_compiled_where_it_can_be(
    wheel_settings: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    compiler: str,
    given: str | None,
    expected: str,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    settings = {} if given is None else {wheel_settings.HOST_ROUTE: given}
    complete = wheel_settings.with_host_route(settings)
    assert complete[wheel_settings.HOST_ROUTE] == expected
    assert complete.get("wheel.platlib") == ("true" if expected == "ON" else None)


def test_a_wheel_without_a_compiler_is_pure(checkout: Path) -> None:
    settings = tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert settings["wheel"] == {"py-api": "py3", "platlib": False, "packages": ["lightmoe"]}


def test_make_refuses_an_unknown_stack(checkout: Path) -> None:
    done = subprocess.run(
        ["make", "install", "GPU=tpu"], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "GPU=tpu is unknown; give one of: cpu cuda12 cuda13" in done.stderr


def test_make_help_lists_the_commands(checkout: Path) -> None:
    done = subprocess.run(["make"], cwd=checkout, capture_output=True, text=True, check=True)
    for command in ("install", "kernels", "launch", "test", "check", "wheel", "clean"):
        assert f"make {command} " in done.stdout
