"""LaunchConfig: defaults, what is refused and how, and flags over recipe over default."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lightmoe.config import LaunchConfig, data_folders, load_recipe, parse_bytes
from lightmoe.errors import UsageError


def config(**values: object) -> LaunchConfig:
    return LaunchConfig(**{"model": "mixtral-lite", "gpus": 10} | values)


@pytest.mark.parametrize(
    ("gpus", "values", "homes", "spares"),
    [
        (10, {}, 8, 2),
        (4, {}, 2, 2),
        (3, {}, 3, 0),
        (1, {}, 1, 0),
        (10, {"spares": 0}, 10, 0),
        (3, {"spares": 2}, 1, 2),
        (10, {"placement": "spread"}, 10, 0),
    ],
)
def test_ranks_are_homes_and_spares(
    gpus: int, values: dict[str, object], homes: int, spares: int
) -> None:
    chosen = config(gpus=gpus, **values)
    assert (chosen.num_homes, chosen.num_spares) == (homes, spares)


def test_defaults_of_the_contract() -> None:
    chosen = config()
    assert (chosen.device, chosen.dtype, chosen.transport) == ("auto", "auto", "auto")
    assert (chosen.placement, chosen.route, chosen.load_format) == ("spare", "waterfill", "auto")
    assert chosen.deterministic == "on"
    assert (chosen.host, chosen.port, chosen.seed) == ("127.0.0.1", 8000, 0)
    assert (chosen.max_num_seqs, chosen.max_num_batched_tokens) == (16, 512)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpus": 0}, "gpus is 0; give an integer from 1 to 1024"),
        ({"gpus": -1}, "gpus is -1; give an integer from 1 to 1024"),
        ({"gpus": 1025}, "gpus is 1025; give an integer from 1 to 1024"),
        ({"gpus": "ten"}, "gpus is 'ten'; give an integer from 1 to 1024"),
        ({"gpus": True}, "gpus is True; give an integer from 1 to 1024"),
        ({"spares": -1}, "spares is -1; give an integer from 0 to 1023"),
        ({"spares": 10}, "at least one home rank is needed: give at most 9 spares"),
        ({"spares": 11}, "at least one home rank is needed: give at most 9 spares"),
        ({"spares": 2, "placement": "spread"}, "spares (2) has no meaning with placement spread"),
        ({"port": 65536}, "port is 65536; give an integer from 0 to 65535"),
        ({"device": "gpu"}, "device is 'gpu'; give one of: auto, cuda, cpu"),
        ({"deterministic": "yes"}, "deterministic is 'yes'; give one of: on, off"),
        ({"dtype": "half"}, "give one of: auto, float32, bfloat16, float16"),
        ({"transport": "local"}, "transport local joins one rank only and gpus is 10"),
        ({"max_num_seqs": 600}, "max_num_batched_tokens (512) is below max_num_seqs (600)"),
        ({"free_slots": 0}, "free_slots (0) leaves no slot for an expert on its way"),
        ({"free_slots": -1}, "free_slots is -1; give an integer from 0 to 1024"),
        ({"rebalance_interval": -1}, "rebalance_interval is -1; give an integer from 0"),
        ({"migration_bytes_per_step": 10}, "migration_bytes_per_step is 10; give an integer"),
        ({"host_copy": "yes"}, "host_copy is 'yes'; give one of: on, off"),
        ({"memory_limit": "11 gigs"}, "memory_limit is '11 gigs'; give a size such as"),
        ({"model": ""}, "model is ''; give a text that is not empty"),
        ({"api_key": ""}, "api_key is ''"),
        ({"seed": 1.5}, "seed is 1.5; give an integer from 0"),
        ({"overflow": "push"}, "overflow is 'push'; give one of: none, redirect, drop"),
        ({"overflow": "drop"}, "deterministic is on; give deterministic off as well, or overflow"),
        ({"capacity_factor": 1.1}, "capacity_factor (1.1) has no meaning with overflow none"),
        ({"capacity_factor": 0.9}, "capacity_factor is 0.9; give a number from 1 to 1000"),
        ({"capacity_factor": float("nan")}, "capacity_factor is nan; give a number from 1"),
        ({"capacity_factor": True}, "capacity_factor is True; give a number from 1 to 1000"),
        (
            {"overflow": "drop", "deterministic": "off", "record_routing": "a.npz"},
            "overflow drop leaves some with fewer; leave one of the two out",
        ),
        (
            {"overlap": "halves", "record_routing": "a.npz"},
            "overlap halves runs them in two; leave one of the two out",
        ),
        ({"routing_skew": "zipf"}, """routing_skew is 'zipf'; give "uniform", or "zipf:1.0\""""),
        ({"routing_skew": "zipf:11"}, "a number up to 10"),
        ({"routing_skew": "zipf:-1"}, "routing_skew is 'zipf:-1'"),
    ],
)
def test_refused_in_one_line_with_the_remedy(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        config(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rank_alone_has_nothing_to_balance() -> None:
    alone, quiet = config(gpus=1, free_slots=0), config(free_slots=0, rebalance_interval=0)
    assert (alone.rebalances, alone.num_free_slots) == (False, 0)
    assert (quiet.rebalances, quiet.num_free_slots) == (False, 0)
    assert (config().rebalances, config().num_free_slots) == (True, 1)
    assert config(gpus=1).num_free_slots == 0


def test_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().port = 1  # type: ignore[misc]


def test_api_key_stays_out_of_logs() -> None:
    assert "hush" not in repr(config(api_key="hush"))


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("11GiB", 11 * 2**30),
        ("512 MiB", 2**29),
        ("1.5GB", 1_500_000_000),
        ("2TiB", 2**41),
        ("1048576", 2**20),
        ("7B", 7),
    ],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes
    assert config(memory_limit=text).memory_limit_bytes == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "0.1", "1e9", "11gib", "1 2GiB", "١GiB"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="give a size such as"):
        parse_bytes(text)


def test_flags_stand_over_recipe_over_default(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('model = "m"\ngpus = 4\nspares = 1\nport = 9000\n')
    chosen = LaunchConfig.from_recipe(recipe, {"gpus": 6, "port": None, "seed": 3})
    assert (chosen.gpus, chosen.spares, chosen.port, chosen.seed) == (6, 1, 9000, 3)
    assert chosen.host == "127.0.0.1"


def test_without_a_recipe_the_flags_are_all() -> None:
    assert LaunchConfig.from_recipe(None, {"model": "m", "gpus": 2}) == config(model="m", gpus=2)


@pytest.mark.parametrize("missing", ["model", "gpus"])
def test_what_nobody_gave_is_named(missing: str) -> None:
    given = {name: value for name, value in (("model", "m"), ("gpus", 2)) if name != missing}
    with pytest.raises(UsageError, match=f"{missing} is missing; give --{missing}"):
        LaunchConfig.from_recipe(None, given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu = 10", r"unknown key 'gpu' in recipe .*mine\.toml; did you mean gpus\?"),
        ("max-model-len = 5", r"unknown key 'max-model-len' .* did you mean max_model_len\?"),
        ("[zoo]\nwindow = 3", r"unknown key 'zoo' in recipe .*; known keys: model, gpus"),
        ("gpus = = 1", r"recipe .*mine\.toml is not valid TOML: .* line 1"),
        ('gpus = "ten"', "gpus is 'ten'; give an integer"),
    ],
)
def test_a_wrong_recipe_names_key_and_file(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(text)
    with pytest.raises(UsageError, match=message):
        LaunchConfig.from_recipe(recipe, {"model": "m"})


def test_a_recipe_that_is_not_text(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"mine\.toml is not valid TOML"):
        load_recipe(recipe)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml cannot be read: No such file"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="'nonesuch' is no file here and no known name; .*cpu-10"):
        load_recipe("nonesuch")


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'spare' in the arguments; .* spares\?"):
        LaunchConfig.from_recipe(None, {"model": "m", "gpus": 2, "spare": 1})


def test_the_working_folder_comes_before_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkout: Path
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "cpu-10.toml").write_text("gpus = 3")
    monkeypatch.chdir(tmp_path)
    assert data_folders("launch")[:2] == [tmp_path / "launch", checkout / "launch"]
    assert load_recipe("cpu-10") == {"gpus": 3}
