"""Finding the description of exactly these cards among files of all kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightmoe.errors import UsageError
from lightmoe.topology.find import find_topology

FILES = Path(__file__).resolve().parents[2] / "topology"
H200 = "NVIDIA H200"
CARDS = [(H200, f"00000000:00:{place:02X}.0") for place in range(6, 10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A measured file among others."""
    (tmp_path / "a-no-toml.toml").write_text("ranks = [")
    (tmp_path / "b-recipe.toml").write_text('gpus = 4\nranks = "all"\n')
    (tmp_path / "c-no-text.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d-unplaced.toml").write_text((FILES / "8xh200-nvlink.toml").read_text())
    (tmp_path / "mine.toml").write_text((FILES / "4xh200-nvlink.toml").read_text())
    return tmp_path


def test_cards_are_found_by_name_and_place(folder: Path) -> None:
    found = find_topology([folder / "nothing here", folder], CARDS)
    assert found is not None
    assert (found.name, found.num_ranks) == ("4xh200-nvlink", 4)
    fewer = find_topology([folder], CARDS[:2])
    assert fewer is not None
    assert fewer.num_ranks == 2
    assert fewer.fabrics[0].ranks == (0, 1)


@pytest.mark.parametrize(
    "cards",
    [
        [],
        CARDS[::-1],
        [("NVIDIA H100", bus_id) for _, bus_id in CARDS],
        [(H200, "00000000:AA:00.0")],
        [(H200, "")],
        [*CARDS, (H200, "00000000:00:0A.0")],
    ],
    ids=["none", "another order", "another name", "another place", "no place", "more"],
)
def test_other_cards_are_not(folder: Path, cards: list[tuple[str, str]]) -> None:
    assert find_topology([folder], cards) is None


def test_a_wrong_description_of_these_cards_is_said(folder: Path) -> None:
    text = (folder / "mine.toml").read_text()
    (folder / "mine.toml").write_text(text.replace('parent = "machine"', 'parent = "nobody"'))
    with pytest.raises(UsageError, match=r"nobody.*mine\.toml"):
        find_topology([folder], CARDS)
