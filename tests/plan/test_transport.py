"""`plan`, `simulate` and `launch` take the same transport by the same figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lightmoe.balancer.simulation import DECODE_TOKENS, Question
from lightmoe.config import LaunchConfig
from lightmoe.machine import Driver, Gpu
from lightmoe.models.config import read_config
from lightmoe.moe.transport_model import predict
from lightmoe.plan import Wish, make_plan
from lightmoe.plan.layouts import expert_parallel
from lightmoe.plan.stages import exchange_shape, launch_transport, layer_exchange
from lightmoe.topology import Topology, read_topology
from lightmoe.worker.devices import Devices
from lightmoe.worker.transports import choose_carrier

ROOT = Path(__file__).resolve().parents[2]
NUM_RANKS, PROMPT, SEQUENCES = 4, 1024, 16
CARDS = Devices("cuda", "4 ranks on 4 GPUs", tuple(range(NUM_RANKS)))
DRIVER = Driver(
    gpus=(Gpu(name="card", compute_capability=(9, 0), memory_bytes=1, free_bytes=1),) * NUM_RANKS,
    p2p_pairs=tuple((a, b) for a in range(NUM_RANKS) for b in range(a + 1, NUM_RANKS)),
)


def machine(name: str) -> Topology:
    return read_topology(ROOT / "topology" / f"{name}.toml").first(NUM_RANKS)


def wish(topology: Topology, **others: int) -> Wish:
    return Wish(
        model=read_config(ROOT / "models" / "mixtral-8x7b"),
        model_name="mixtral-8x7b",
        topology=topology,
        **({"batch": SEQUENCES * NUM_RANKS, "prompt": PROMPT} | others),
    )


def question(topology: Topology, tokens: int) -> Question:
    return Question(
        topology=topology,
        model=read_config(ROOT / "models" / "mixtral-8x7b"),
        model_name="mixtral-8x7b",
        tokens_per_rank=tokens,
        chunks=1,
        micro_batches=1,
        layers=1,
        skew=0.0,
        transport=None,
        quantization="none",
        seed=0,
        measured=None,
    )


@pytest.mark.parametrize("name", ["4xh200-nvlink", "10x2080ti-pcie"])
def test_three_commands_one_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    topology = machine(name)
    asked = wish(topology)
    planned = launch_transport(asked)
    assert planned is not None
    tokens = asked.step_tokens
    launched = choose_carrier(
        LaunchConfig(
            model="mixtral-8x7b",
            gpus=NUM_RANKS,
            max_num_batched_tokens=tokens,
            max_num_seqs=SEQUENCES,
        ),
        CARDS,
        DRIVER,
        topology,
        element_bytes=2,
    )
    assert (planned.way.transport, planned.way.road == "host") == (
        launched.transport,
        launched.on_host,
    )
    assert planned.reason == launched.reason
    assert DECODE_TOKENS == SEQUENCES
    simulated, why = question(topology, tokens).chosen_transport
    assert simulated == launched.transport
    assert why.endswith(launched.reason)
    assert make_plan(asked).transport.endswith(launched.reason)


def test_the_plan_reckons_with_the_transport_taken() -> None:
    topology = machine("4xh200-nvlink")
    near, far = wish(topology), wish(replace(topology, fabrics=()))
    tokens = [16.0] * NUM_RANKS
    for asked in (near, far):
        choice = launch_transport(asked)
        assert choice is not None
        expected = predict(asked.topology, choice.way, exchange_shape(asked), tokens)
        assert layer_exchange(asked, tokens) == expected
    assert layer_exchange(near, tokens).total < layer_exchange(far, tokens).total


def test_one_rank_has_none() -> None:
    alone = wish(machine("4xh200-nvlink").first(1))
    assert launch_transport(alone) is None
    assert layer_exchange(alone, [16.0]).total == 0
    assert make_plan(alone).transport == "local: one rank"


def test_what_is_asked_for_is_simulated() -> None:
    topology = machine("4xh200-nvlink")
    asked = replace(question(topology, 512), transport="nccl")
    assert asked.chosen_transport == ("nccl", "nccl, as asked")
    on_cpu = replace(question(topology, 512), topology=machine("cpu-10"))
    assert on_cpu.chosen_transport == ("gloo", "gloo")


@pytest.mark.parametrize(("name", "overlaps"), [("4xh200-nvlink", True), ("cpu-10", False)])
def test_only_what_needs_no_host_is_planned_in_chunks(name: str, overlaps: bool) -> None:
    """As the launch: gloo and nccl wait for the host in every layer."""
    topology = read_topology(ROOT / "topology" / f"{name}.toml").first(NUM_RANKS)
    assert ("no overlap: the host takes part" in expert_parallel(wish(topology)).note) != overlaps
