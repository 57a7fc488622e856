"""Expert load on disk: what is written can be read back, and what is wrong is said in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.errors import UsageError
from lightmoe.telemetry import heatmap
from lightmoe.telemetry.heatmap import LoadTable


def make_table(
    num_layers: int = 4, num_experts: int = 8, num_homes: int = 8, num_spares: int = 2
) -> LoadTable:
    """Random counts; the first expert of every layer also has a replica on the last rank."""
    random = np.random.default_rng(3)
    num_ranks = num_homes + num_spares
    placement = tuple(
        tuple(
            (expert % num_homes, num_ranks - 1)
            if expert == 0 and num_spares
            else (expert % num_homes,)
            for expert in range(num_experts)
        )
        for _ in range(num_layers)
    )
    return LoadTable(
        model="mixtral-lite",
        expert_tokens=random.integers(0, 1000, (num_layers, num_experts)),
        rank_pairs=random.integers(0, 1000, (num_ranks, num_layers)),
        rank_kinds=("home",) * num_homes + ("spare",) * num_spares,
        placement=placement,
        epoch=3,
        num_steps=17,
    )


def assert_equal(one: LoadTable, other: LoadTable) -> None:
    assert heatmap.load_table_to_json(one) == heatmap.load_table_to_json(other)


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@settings(deadline=None)
@given(
    num_layers=st.integers(1, 5),
    num_experts=st.integers(1, 9),
    num_homes=st.integers(1, 4),
    num_spares=st.integers(0, 2),
)
def test_json_round_trip(**sizes: int) -> None:
    table = make_table(**sizes)
    text = json.dumps(heatmap.load_table_to_json(table))
    assert_equal(heatmap.load_table_from_json(json.loads(text)), table)


@pytest.mark.parametrize("sizes", [(4, 8, 8, 2), (1, 1, 1, 0), (48, 128, 8, 2)])
def test_npz_round_trip(tmp_path: Path, sizes: tuple[int, int, int, int]) -> None:
    table = make_table(*sizes)
    heatmap.save(table, tmp_path / "load.npz")
    assert_equal(heatmap.load_npz(tmp_path / "load.npz"), table)


def test_npz_holds_plain_arrays(tmp_path: Path) -> None:
    table = make_table()
    heatmap.save(table, tmp_path / "load.npz")
    with np.load(tmp_path / "load.npz", allow_pickle=False) as arrays:
        assert arrays["expert_tokens"].shape == (4, 8)
        assert arrays["rank_pairs"].shape == (10, 4)
        assert arrays["rank_is_spare"].tolist() == [False] * 8 + [True] * 2
        assert arrays["placement"].shape == (4, 8, 2)
        assert arrays["placement"][0, :2].tolist() == [[0, 9], [1, -1]]


def test_json_is_what_the_server_sends(tmp_path: Path) -> None:
    table = make_table()
    heatmap.save(table, tmp_path / "load.json")
    document = json.loads((tmp_path / "load.json").read_text())
    assert (document["num_layers"], document["num_experts"], document["num_ranks"]) == (4, 8, 10)
    assert document["expert_tokens"] == table.expert_tokens.tolist()
    assert_equal(heatmap.load_table_from_json(document), table)


@pytest.mark.parametrize("sizes", [(4, 8, 8, 2), (48, 128, 8, 2), (1, 1, 1, 0), (27, 64, 28, 4)])
def test_png_is_readable_at_any_size(tmp_path: Path, sizes: tuple[int, int, int, int]) -> None:
    heatmap.save(make_table(*sizes), tmp_path / "load.PNG")
    width, height = png_size(tmp_path / "load.PNG")
    assert 1000 < width < 4000
    assert 400 < height < 2000


def test_the_picture_says_what_is_hot_and_marks_the_spares() -> None:
    from lightmoe.telemetry.heatmap_figure import draw_load

    table = make_table()
    table.expert_tokens[:] = 10
    table.expert_tokens[2, 5] = 80
    table.rank_pairs[:] = 10
    table.rank_pairs[9] = 20
    figure = draw_load(table)
    words = " ".join(text.get_text() for text in figure.texts)
    assert "mixtral-lite" in words
    assert "390 (token, expert) pairs in 17 steps" in words
    assert "hottest: layer 2 expert 5, 4.3× mean" in words
    assert "busiest: rank 9 (spare), 1.82× mean" in words
    experts, ranks = figure.axes[:2]
    assert experts.images[0].get_array()[2, 5] == pytest.approx(80 * 8 / 150)
    assert "4.3" in [text.get_text() for text in experts.texts]
    labels = [text for text in ranks.texts if text.get_text() == "spare"]
    assert [text.get_position()[0] for text in labels] == [8, 9]
    assert len(ranks.patches) == 2


def test_no_tokens_yet_is_said_not_divided_by() -> None:
    from lightmoe.telemetry.heatmap_figure import draw_load

    table = make_table()
    table.expert_tokens[:] = 0
    table.rank_pairs[:] = 0
    assert (table.expert_ratios == 1).all()
    assert "no tokens counted yet" in [text.get_text() for text in draw_load(table).texts]


@pytest.mark.parametrize("name", ["load.pt", "load", "load.png.txt"])
def test_unknown_suffix_lists_the_known(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.npz, \.json"):
        heatmap.save(make_table(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["png", "npz", "json"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "absent" / f"load.{suffix}"
    with pytest.raises(UsageError, match=f"absent/load.{suffix} cannot be written"):
        heatmap.save(make_table(), path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("expert_tokens", None, "malformed"),
        ("expert_tokens", [], r"shape \(0,\)"),
        ("expert_tokens", [[1, 2], [3]], "malformed"),
        ("expert_tokens", [["x"] * 8] * 4, "'x' is no integer"),
        ("expert_tokens", [[-1] * 8] * 4, "negative"),
        ("expert_tokens", [[2**70] * 8] * 4, "malformed"),
        ("rank_pairs", [[1] * 4] * 9, r"shape \(9, 4\)"),
        ("placement", [[[0]] * 8] * 3, "another number of layers"),
        ("placement", [[[0, 10]] * 8] * 4, "not among 10"),
        ("rank_kinds", "home", "no list"),
        ("epoch", "3", "no integer"),
    ],
)
def test_malformed_json_is_refused(field: str, value: Any, message: str) -> None:
    document = heatmap.load_table_to_json(make_table()) | {field: value}
    with pytest.raises(UsageError, match=message):
        heatmap.load_table_from_json(document)


@pytest.mark.parametrize(
    "field", ["model", "expert_tokens", "rank_pairs", "rank_kinds", "placement", "num_steps"]
)
def test_missing_field_is_named(field: str) -> None:
    document = heatmap.load_table_to_json(make_table())
    del document[field]
    with pytest.raises(UsageError, match=f"no field '{field}'"):
        heatmap.load_table_from_json(document)


def test_object_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hostile.npz"
    heatmap.save(make_table(), path)
    with np.load(path) as arrays:
        content = dict(arrays)
    content["rank_is_spare"] = np.array([{"not": "a number"}] * 10, dtype=object)
    with path.open("wb") as file:
        np.savez(file, **content)
    with pytest.raises(UsageError, match=r"hostile\.npz is no expert load"):
        heatmap.load_npz(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken", b"\x80\x04N."])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"other\.npz is no expert load"):
        heatmap.load_npz(path)


def test_a_missing_file_and_a_bare_array_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.npz cannot be read"):
        heatmap.load_npz(tmp_path / "absent.npz")
    np.save(tmp_path / "bare.npy", np.zeros(3))
    with pytest.raises(UsageError, match=r"bare\.npy is no expert load"):
        heatmap.load_npz(tmp_path / "bare.npy")


@settings(deadline=None)
@given(cut=st.integers(0, 2000))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "load.npz"
    heatmap.save(make_table(), path)
    content = path.read_bytes()
    path.write_bytes(content[: min(cut, len(content) - 1)])
    with pytest.raises(UsageError, match=r"load\.npz"):
        heatmap.load_npz(path)
