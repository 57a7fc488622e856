"""Topology files: every shipped one reads; what is wrong with a file is said by name."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightmoe.config import find_data_file
from lightmoe.errors import UsageError
from lightmoe.topology import parse_topology, read_topology, to_toml
from tests.topology.machines import box, linked

FILES = sorted((Path(__file__).resolve().parents[2] / "topology").glob("*.toml"))
GOOD = tomllib.loads(to_toml(box(((0, 1),))))


def test_the_shipped_files_are_found() -> None:
    assert {"10x2080ti-pcie", "8xh200-nvlink", "cpu-10"} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_file_reads_by_path_and_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = read_topology(file)
    monkeypatch.chdir(file.parents[1])
    assert read_topology(find_data_file("topology", file.stem)) == topology
    assert topology.name == file.stem
    assert topology.sources
    parts = [*topology.devices.values(), *topology.links.values(), *topology.fabrics]
    assert all(part.source or part.origin == "measured" for part in parts)
    assert f"[{file.name}]({file.name})" in (file.parent / "README.md").read_text()


def test_figures_of_the_shipped_files() -> None:
    pcie, nvlink, cpu = (
        read_topology(next(file for file in FILES if file.stem == name))
        for name in ("10x2080ti-pcie", "8xh200-nvlink", "cpu-10")
    )
    assert (pcie.num_ranks, pcie.device(0).compute_capability) == (10, "7.5")
    assert not pcie.has_p2p(0, 1)
    per_rank = 128 << 20
    matrix = [[0 if s == t else per_rank / 7 for t in range(8)] for s in range(8)]
    assert 330e9 <= per_rank / nvlink.all_to_all_seconds(matrix) <= 380e9
    small = [[0 if s == t else 1024.0 for t in range(10)] for s in range(10)]
    assert cpu.all_to_all_seconds(small) == pytest.approx(3.4e-3, rel=0.05)


@pytest.mark.parametrize("topology", [box(((0, 1),)), linked()], ids=["box", "linked"])
def test_what_is_written_is_read_back(tmp_path: Path, topology: Any) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(to_toml(topology, ["one", "", 'two "three"']))
    assert read_topology(path) == topology


def edit(*keys: Any, value: Any = None) -> Callable[[dict[str, Any]], None]:
    """Set, or without a value drop, what the keys lead to."""

    def change(values: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            values = values[key]
        if value is None:
            del values[last]
        else:
            values[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit("p2p_group", value=[]), "unknown key 'p2p_group' .* did you mean p2p_groups"),
        (edit("links", "x16", "lane", value=8), "did you mean lanes"),
        (edit("ranks"), "lacks ranks"),
        (edit("ranks", value=[]), "has no ranks"),
        (edit("devices", "card", "memory_bytes"), "devices.card lacks memory_bytes"),
        (edit("devices", "card", "memory_bytes", value=1.5), "memory_bytes is 1.5 .* whole number"),
        (edit("devices", "card", "memory_bytes", value=0), "memory_bytes is 0 .* over 0"),
        (edit("devices", "card", "flops_share", value=1.5), "flops_share is 1.5 .* up to 1"),
        (edit("devices", "card", "kind", value="gpu"), "kind is 'gpu' .* cuda, cpu"),
        (edit("devices", "card", "origin", value="guess"), "measured, public, derived"),
        (edit("links", "x16", "latency_seconds", value=-1), "latency_seconds is -1 .* from 0"),
        (edit("links", "x16", "latency_seconds", value=True), "latency_seconds is True"),
        (edit("links", "x16", "up_bytes_per_second", value=float("inf")), "is inf"),
        (edit("links", "x16", "duplex", value="no"), "duplex is 'no' .* true or false"),
        (edit("links", value=[]), "is no table; write .links.NAME."),
        (edit("links", "x16", value=3), "links.x16 is no table of fields"),
        (edit("ranks", 0, value="x16"), "ranks.0. is no table of fields"),
        (edit("ranks", 0, "link", value="x161"), "link is .x161. .* did you mean x16"),
        (edit("ranks", 0, "parent", value="plx"), "parent is 'plx' .* described: machine"),
        (edit("ranks", 0, "device", value="cord"), "device is 'cord' .* did you mean card"),
        (edit("nodes", "socket0", "memory", value="memroy"), "did you mean memory"),
        (edit("nodes", "machine", "parent", value="switch0"), "link is '' .*"),
        (edit("nodes", "socket0", "parent"), "has 2 nodes without a parent .machine, socket0."),
        (edit("nodes", "socket0", "parent", value="switch0"), "socket0 is above itself"),
        (edit("p2p_groups", value=[[0, 9]]), "names rank 9; its ranks are 0 to 3"),
        (edit("p2p_groups", value=[0]), "ranks is 0 .* a list"),
        (edit("name", value=3), "name is 3 .* a text"),
    ],
)
def test_a_bad_file_says_what_is_wrong(change: Any, words: str) -> None:
    values = copy.deepcopy(GOOD)
    change(values)
    with pytest.raises(UsageError, match=words):
        parse_topology(values, "topology x.toml")


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_topology(path)
    path.write_text("name = ")
    with pytest.raises(UsageError, match="is not valid TOML"):
        read_topology(path)
    with pytest.raises(UsageError, match="topology 'nowhere' is no file here"):
        find_data_file("topology", "nowhere")
