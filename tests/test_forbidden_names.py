"""What import-linter cannot see: pickle by any door, eval, torch.distributed outside its room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lightmoe"
SOURCES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_DOTTED = {"torch.load", "torch.save", "yaml.load"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile"}
OBJECT_COLLECTIVES = ("_object_list", "_gather_object", "gather_object")
DISTRIBUTED = ("torch.distributed", "cupy")


def dotted(node: ast.AST) -> str:
    """ "torch.cuda.nccl" of the expression torch.cuda.nccl; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (prefix := dotted(node.value)):
        return f"{prefix}.{node.attr}"
    return ""


def names_used(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a module imports or mentions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield dotted(node) or node.attr


def forbidden_in(source: str, in_distributed: bool = False) -> set[str]:
    """What of a module's source may not be there."""
    tree = ast.parse(source)
    found = set()
    for name in names_used(tree):
        if name.partition(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_DOTTED:
            found.add(name)
        if name.endswith(OBJECT_COLLECTIVES):
            found.add(name)
        outside = not in_distributed and any(
            name == room or name.startswith(f"{room}.") for room in DISTRIBUTED
        )
        if outside:
            found.add(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= {node.func.id} & FORBIDDEN_BUILTINS
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found |= {"allow_pickle"} if ast.unparse(node.value) != "False" else set()
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_has_no_forbidden_name(path: Path) -> None:
    in_distributed = path.is_relative_to(PACKAGE / "distributed")
    assert forbidden_in(path.read_text(encoding="utf-8"), in_distributed) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "import torch\ntorch.load('x')",
        "from torch import save",
        "import torch.distributed as dist",
        "from torch import distributed",
        "import torch\ntorch.distributed.barrier()",
        "from cupy.cuda import nccl",
        "group.broadcast_object_list([1])",
        "eval('1')",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_the_check_sees_each_door(source: str) -> None:
    assert forbidden_in(source)


@pytest.mark.parametrize(
    "source", ["model.eval()", "np.load('x', allow_pickle=False)", "import re\nre.compile('x')"]
)
def test_the_check_lets_the_harmless_pass(source: str) -> None:
    assert forbidden_in(source) == set()


def test_distributed_may_name_its_libraries() -> None:
    assert forbidden_in("import torch.distributed as dist", in_distributed=True) == set()
