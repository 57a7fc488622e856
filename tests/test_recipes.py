"""Every recipe in launch/ loads, is listed in its README, and says what its name promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightmoe.config import LaunchConfig

RECIPES = sorted((Path(__file__).resolve().parents[1] / "launch").glob("*.toml"))


def test_the_shipped_recipes_are_found() -> None:
    assert {"cpu-10", "10x2080ti"} <= {recipe.stem for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_loads_by_path_and_by_name(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_path = LaunchConfig.from_recipe(recipe, {})
    monkeypatch.chdir(recipe.parent.parent)
    assert LaunchConfig.from_recipe(recipe.stem, {}) == by_path
    assert (by_path.gpus, by_path.num_homes, by_path.num_spares) == (10, 8, 2)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_is_in_the_table_of_the_readme(recipe: Path) -> None:
    assert f"[{recipe.name}]({recipe.name})" in (recipe.parent / "README.md").read_text()
