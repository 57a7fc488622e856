"""Reads a topology file, or says what is wrong with it: every field, every name that it refers to.

name, description, sources, num_cores, p2p_groups
[devices.NAME]  [links.NAME]  [nodes.NAME]  [[ranks]]  [[fabrics]]      fields: parts.py
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lightmoe.errors import UsageError
from lightmoe.topology.parts import Device, Fabric, Link, Node, Rank
from lightmoe.topology.tree import Topology

Part = TypeVar("Part", Device, Fabric, Link, Node, Rank)

_TOP_KEYS = {item.name for item in fields(Topology)}
_MAY_BE_ZERO = {
    "generation",
    "lanes",
    "latency_seconds",
    "max_generation",
    "max_lanes",
    "message_seconds",
    "num_cores",
}


def read_topology(path: Path) -> Topology:
    """Read a file; UsageError names the file, the field and the remedy."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"topology {path} is not valid TOML: {error}") from error
    except OSError as error:
        raise UsageError(f"topology {path} cannot be read: {error.strerror}") from error
    return parse_topology(values, f"topology {path}")


def parse_topology(values: Mapping[str, Any], source: str) -> Topology:
    """Check the values of a file; `source` is how errors call it."""
    _check_keys(values, _TOP_KEYS, source)
    for required in ("name", "description", "devices", "links", "nodes", "ranks"):
        if required not in values:
            raise UsageError(f"{source} lacks {required}; see the files in topology/")
    topology = Topology(
        name=_value("name", values["name"], str, source),
        description=_value("description", values["description"], str, source),
        devices=_table(Device, values["devices"], f"{source}, devices"),
        links=_table(Link, values["links"], f"{source}, links"),
        nodes=_table(Node, values["nodes"], f"{source}, nodes"),
        ranks=_list(Rank, values["ranks"], f"{source}, ranks"),
        fabrics=_list(Fabric, values.get("fabrics", []), f"{source}, fabrics"),
        p2p_groups=_groups(values.get("p2p_groups", []), source),
        num_cores=_value("num_cores", values.get("num_cores", 0), int, source),
        sources=_value("sources", values.get("sources", []), tuple[str, ...], source),
    )
    _check_references(topology, source)
    return topology


def _table(kind: type[Part], values: object, source: str) -> dict[str, Part]:
    if not isinstance(values, dict):
        raise UsageError(f"{source} is no table; write [{source.rpartition(' ')[2]}.NAME]")
    return {
        name: _part(kind, {"name": name, **entry}, f"{source}.{name}")
        if isinstance(entry, dict)
        else _not_a_table(f"{source}.{name}")
        for name, entry in values.items()
    }


def _list(kind: type[Part], values: object, source: str) -> tuple[Part, ...]:
    if not isinstance(values, list):
        raise UsageError(f"{source} is no list of tables; write [[{source.rpartition(' ')[2]}]]")
    return tuple(
        _part(kind, entry, f"{source}[{index}]")
        if isinstance(entry, dict)
        else _not_a_table(f"{source}[{index}]")
        for index, entry in enumerate(values)
    )


def _not_a_table(source: str) -> Any:
    raise UsageError(f"{source} is no table of fields; see the files in topology/")


def _part(kind: type[Part], values: Mapping[str, Any], source: str) -> Part:
    known = {item.name: item for item in fields(kind)}
    _check_keys(values, known, source)
    for item in known.values():
        if item.default is MISSING and item.name not in values:
            raise UsageError(f"{source} lacks {item.name}; see the files in topology/")
    hints = get_type_hints(kind)
    return kind(
        **{name: _value(name, value, hints[name], source) for name, value in values.items()}
    )


def _check_keys(names: Iterable[str], known: Iterable[str], source: str) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, list(known), n=1)
            remedy = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"
            raise UsageError(f"unknown key {name!r} in {source}; {remedy}")


def _value(name: str, value: object, kind: Any, source: str) -> Any:
    """The value in its type, or a UsageError that says what may stand there."""
    if get_origin(kind) is Literal:
        return _checked(value in get_args(kind), name, value, source, ", ".join(get_args(kind)))
    if get_origin(kind) is tuple:
        _checked(isinstance(value, list), name, value, source, "a list")
        assert isinstance(value, list)
        return tuple(_value(name, item, get_args(kind)[0], source) for item in value)
    if kind in (int, float):
        return _number(name, value, kind, source)
    wanted = {str: "a text", bool: "true or false"}[kind]
    return _checked(isinstance(value, kind), name, value, source, wanted)


def _number(name: str, value: object, kind: type, source: str) -> float | int:
    is_number = isinstance(value, int if kind is int else int | float)
    good = is_number and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]
    what = "a whole number" if kind is int else "a number"
    _checked(good, name, value, source, what)
    assert isinstance(value, int | float)
    if name.endswith("_share"):
        _checked(0 < value <= 1, name, value, source, "a number over 0, up to 1")
    elif name in _MAY_BE_ZERO or name == "ranks":
        _checked(value >= 0, name, value, source, f"{what} from 0")
    else:
        _checked(value > 0, name, value, source, f"{what} over 0")
    return kind(value)  # type: ignore[no-any-return]


def _checked(good: bool, name: str, value: object, source: str, wanted: str) -> Any:
    if not good:
        raise UsageError(f"{name} is {value!r} in {source}; give {wanted}")
    return value


def _groups(values: object, source: str) -> tuple[tuple[int, ...], ...]:
    """p2p_groups: lists of ranks."""
    _checked(isinstance(values, list), "p2p_groups", values, source, "lists of ranks")
    assert isinstance(values, list)
    return tuple(_value("ranks", group, tuple[int, ...], source) for group in values)


def _check_references(topology: Topology, source: str) -> None:
    """Every name refers to something, the nodes are one tree, fabrics join ranks that exist."""
    if not topology.ranks:
        raise UsageError(f"{source} has no ranks; write [[ranks]] for each of them")
    for rank, entry in enumerate(topology.ranks):
        where = f"{source}, ranks[{rank}]"
        _check_name(entry.device, topology.devices, "device", where)
        _check_name(entry.parent, topology.nodes, "parent", where)
        _check_name(entry.link, topology.links, "link", where)
    for node in topology.nodes.values():
        where = f"{source}, nodes.{node.name}"
        if node.parent:
            _check_name(node.parent, topology.nodes, "parent", where)
            _check_name(node.link, topology.links, "link", where)
        if node.memory:
            _check_name(node.memory, topology.links, "memory", where)
    _check_tree(topology, source)
    for group in [*topology.p2p_groups, *(fabric.ranks for fabric in topology.fabrics)]:
        for member in group:
            if member >= topology.num_ranks:
                raise UsageError(
                    f"{source} names rank {member}; its ranks are 0 to {topology.num_ranks - 1}"
                )


def _check_name(name: str, known: Mapping[str, object], field: str, source: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, list(known), n=1)
        remedy = f"did you mean {close[0]}?" if close else f"described: {', '.join(known)}"
        raise UsageError(f"{field} is {name!r} in {source}; {remedy}")


def _check_tree(topology: Topology, source: str) -> None:
    roots = [node.name for node in topology.nodes.values() if not node.parent]
    if len(roots) != 1:
        raise UsageError(
            f"{source} has {len(roots)} nodes without a parent ({', '.join(roots) or 'none'});"
            " exactly one is the root"
        )
    for node in topology.nodes.values():
        seen, name = {node.name}, node.parent
        while name:
            if name in seen:
                raise UsageError(f"{source}: node {name} is above itself; mend its parent")
            seen.add(name)
            name = topology.nodes[name].parent
