"""Writes a topology file that a person can read and edit; `reader.py` reads it back the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields

from lightmoe.topology.parts import Device, Fabric, Link, Node, Rank
from lightmoe.topology.tree import Topology

Part = Device | Fabric | Link | Node | Rank


def to_toml(topology: Topology, comments: Sequence[str] = ()) -> str:
    """The file's text; `comments` are lines for its head. Fields at their default are left out."""
    lines = [f"# {comment}".rstrip() for comment in comments]
    lines += [
        "",
        f"name = {_text(topology.name)}",
        f"description = {_text(topology.description)}",
        f"sources = {_list(topology.sources)}",
        f"p2p_groups = {_list(topology.p2p_groups)}  # ranks that copy to each other over PCIe",
        f"num_cores = {topology.num_cores}",
        "ranks = [",
        *(f"    {{ {', '.join(_fields(rank))} }}," for rank in topology.ranks),
        "]",
    ]
    for title, table in (
        ("devices", topology.devices),
        ("links", topology.links),
        ("nodes", topology.nodes),
    ):
        lines += _table(title, table)
    for fabric in topology.fabrics:
        lines += ["", "[[fabrics]]", *_fields(fabric)]
    return "\n".join(lines).strip("\n") + "\n"


def _table(
    title: str, table: Mapping[str, Device] | Mapping[str, Link] | Mapping[str, Node]
) -> list[str]:
    lines = []
    for name, entry in table.items():
        lines += ["", f"[{title}.{_key(name)}]"]
        lines += [line for line in _fields(entry) if not line.startswith("name = ")]  # the key
    return lines


def _fields(part: Part) -> Iterator[str]:
    for item in fields(part):
        value = getattr(part, item.name)
        if item.default is MISSING or value != item.default:
            yield f"{item.name} = {_value(value)}{_remark(item.name, value)}"


def _remark(name: str, value: object) -> str:
    """The same figure in units that people say."""
    if name.endswith("bytes_per_second") and isinstance(value, float):
        return f"  # {value / 1e9:.1f} GB/s"
    if name == "flops_per_second" and isinstance(value, float):
        return f"  # {value / 1e12:.3g} TFLOP/s"
    if name == "memory_bytes" and isinstance(value, int):
        return f"  # {value / 2**30:.1f} GiB"
    return ""


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 10**6 else str(value)
    return _list(value) if isinstance(value, tuple) else _text(str(value))


def _float(value: float) -> str:
    """54.24e9 in place of 54240000000.0; always with a sign of being no integer."""
    for exponent in (12, 9, 6):
        if abs(value) >= 10**exponent:
            return f"{value / 10**exponent:.4g}e{exponent}"
    text = f"{value:.4g}"
    return text if any(sign in text for sign in ".e") else f"{text}.0"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _list(values: Sequence[object]) -> str:
    return f"[{', '.join(_value(value) for value in values)}]"


def _text(value: str) -> str:
    """A TOML basic string."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    for character, written in (("\n", "\\n"), ("\t", "\\t"), ("\r", "\\r")):
        escaped = escaped.replace(character, written)
    return f'"{escaped}"'
