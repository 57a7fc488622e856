"""Launches with fewer slots than experts: what `auto` becomes, what is refused, what is said."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from lightmoe import launch
from lightmoe.config import LaunchConfig
from lightmoe.core import HostTierCounts
from lightmoe.errors import MachineError, UsageError
from lightmoe.launch import host_tier_line, start_engine
from lightmoe.machine import Driver, Gpu
from lightmoe.models.config import read_config
from lightmoe.models.find import find_model
from lightmoe.worker import devices, fit
from lightmoe.worker.fit import Fitted
from lightmoe.worker.resolve import resolve

GIB = 1 << 30
MODEL = read_config(find_model("mixtral-8x7b"))


def turing(num_cards: int) -> Driver:
    card = Gpu(
        name="RTX 2080 Ti",
        compute_capability=(7, 5),
        memory_bytes=11 * GIB,
        free_bytes=11 * GIB,
    )
    return Driver(version="535.183.01", gpus=(card,) * num_cards)


def config(**values: object) -> LaunchConfig:
    wanted: dict[str, object] = {"model": "mixtral-8x7b", "load_format": "dummy", "gpus": 4}
    return LaunchConfig(**wanted | {"max_model_len": 2048} | values)  # type: ignore[arg-type]


def fitted_to(asked: LaunchConfig, driver: Driver) -> Fitted:
    return fit.fit(asked, MODEL, driver)


@pytest.fixture(autouse=True)
def _roomy_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "free_ram_bytes", lambda: 1024 * GIB)


@pytest.fixture
def _torch_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "read_cupy", lambda: ("cupy-cuda12x 14.2.0",))


@pytest.mark.usefixtures("_torch_with_cuda")
def test_what_does_not_fit_the_cards_lives_in_the_host() -> None:
    """Mixtral-8x7B in 16 bits has 84 GiB of experts, and four cards 11 GiB each."""
    driver = turing(4)

    fitted = fitted_to(config(), driver)

    tiered = fitted.config
    assert tiered.expert_slots is not None
    assert 16 <= tiered.expert_slots <= 20  # of 336 MiB in 9.9 GiB, with 3 GiB of dense layers
    assert (tiered.num_spares, tiered.num_free_slots, tiered.rebalances) == (0, 0, False)
    assert fitted.resolved.transport == "nccl"
    assert fitted.sizing.num_slots == tiered.expert_slots
    assert resolve(config(), driver).transport == "copy_engine"
    again = fitted_to(tiered, driver)
    assert (again.config, again.resolved) == (tiered, fitted.resolved)
    assert again.sizing.host_bytes == fitted.sizing.host_bytes > 80 * GIB
    alone = fitted_to(config(gpus=1), driver)
    assert alone.config.expert_slots == tiered.expert_slots
    assert alone.resolved.transport == "local"


@pytest.mark.usefixtures("_torch_with_cuda")
def test_what_fits_or_runs_on_cpus_is_left_alone() -> None:
    roomy = turing(4)
    roomy = replace(roomy, gpus=tuple(replace(gpu, free_bytes=80 * GIB) for gpu in roomy.gpus))

    for asked, driver in ((config(), roomy), (config(device="cpu"), turing(4))):
        assert fitted_to(asked, driver).config == asked


@pytest.mark.usefixtures("_torch_with_cuda")
@pytest.mark.parametrize(("num_gib", "tiers"), [(11, 1), (80, 0)])
def test_a_machine_is_looked_at_once(
    num_gib: int, tiers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where not all fits a second time: what carries rows then is another."""
    driver = turing(4)
    driver = replace(
        driver, gpus=tuple(replace(gpu, free_bytes=num_gib * GIB) for gpu in driver.gpus)
    )
    calls = {name: Mock(wraps=getattr(fit, name)) for name in ("resolve", "size_ranks")}
    for name, call in calls.items():
        monkeypatch.setattr(fit, name, call)

    fitted_to(config(), driver)

    assert {call.call_count for call in calls.values()} == {1 + tiers}


@pytest.mark.usefixtures("_torch_with_cuda")
@pytest.mark.parametrize(
    ("values", "obstacle"),
    [
        ({"spares": 1}, r"spares \(1\)"),
        ({"transport": "copy_engine"}, "transport copy_engine"),
        ({"peer_memory": "device"}, "peer_memory device"),
        ({"payload": "int8", "deterministic": "off"}, "payload int8"),
        ({"overlap": "halves"}, "overlap halves"),
        ({"host_copy": "on"}, "host_copy on"),
    ],
)
def test_what_keeps_experts_from_the_host_is_named(
    values: dict[str, object], obstacle: str
) -> None:
    with pytest.raises(UsageError, match=rf"expert_slots \(20\) and {obstacle} exclude each other"):
        config(expert_slots=20, **values)
    with pytest.raises(MachineError, match=rf"weights need .* without {obstacle} experts could"):
        fitted_to(config(**values), turing(4))


@pytest.mark.usefixtures("_torch_with_cuda")
def test_cards_too_small_for_one_layer_are_refused_as_ever() -> None:
    small = turing(1)
    small = replace(small, gpus=(replace(small.gpus[0], free_bytes=5 * GIB),))

    with pytest.raises(MachineError, match="the weights need"):
        fitted_to(config(gpus=1), small)


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"expert_slots": 0}, UsageError, "expert_slots is 0; give an integer from 1"),
        ({"expert_slots": 1, "gpus": 4}, UsageError, "holds 2 experts of one layer, .* at least 2"),
        ({"expert_slots": 7, "gpus": 1}, UsageError, "at least 8, or more ranks"),
        ({"expert_slots": 99, "gpus": 1}, UsageError, "99, and a rank has 32 experts at most"),
        ({"expert_slots": 8, "memory_limit": "20MiB"}, MachineError, "40 experts, those of --expe"),
    ],
)
def test_too_few_slots_are_refused_before_ranks_start(
    values: dict[str, object], error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        pytest.fail("ranks were started")

    monkeypatch.setattr(launch, "RayWorkerGroup", start)
    wanted = {"model": "mixtral-lite", "device": "cpu", "load_format": "auto", "gpus": 1}
    with pytest.raises(error, match=said):
        start_engine(config(**wanted | values), lambda stage, done, total: None)


@pytest.mark.usefixtures("_torch_with_cuda")
def test_a_host_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = turing(4)
    monkeypatch.setattr(launch, "read_driver", lambda: driver)
    monkeypatch.setattr(fit, "free_ram_bytes", lambda: 64 * GIB)

    with pytest.raises(MachineError, match=r"84\.0 GiB of experts .* 64\.0 GiB are free"):
        start_engine(config(), lambda stage, done, total: None)


def test_the_last_line_says_what_it_did() -> None:
    line = host_tier_line(HostTierCounts(90, 10, 40, 3 << 30, 1.5))

    assert line.startswith("host tier: 90.0% of 100 experts were in their slots")
    assert "40 fetched ahead" in line
    assert "3.00 GiB fetched, ranks waited 1.50 s" in line
