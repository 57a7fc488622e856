"""The plan: memory that adds up, rates that obey the roofline, and the right verdict."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lightmoe.errors import UsageError
from lightmoe.models.config import read_config
from lightmoe.plan import Wish, make_plan, render
from lightmoe.plan.layouts import all_layouts, expert_parallel, one_card, replicate
from lightmoe.plan.memory import memory_map, usable_bytes
from lightmoe.plan.stages import exchange_matrices, touched
from lightmoe.topology import Topology, read_topology

ROOT = Path(__file__).resolve().parents[2]


def machine(name: str, num_ranks: int) -> Topology:
    return read_topology(ROOT / "topology" / f"{name}.toml").first(num_ranks)


def wish(
    model: str = "mixtral-8x7b", topology: str = "10x2080ti-pcie", gpus: int = 10, **others: object
) -> Wish:
    return Wish(
        model=read_config(ROOT / "models" / model),
        model_name=model,
        topology=machine(topology, gpus),
        **others,  # type: ignore[arg-type]
    )


INT4 = wish(quantization="int4", spares=2)


def test_the_memory_of_every_rank_adds_up() -> None:
    ranks = memory_map(INT4)
    assert sum(entry.num_homes for entry in ranks) == 32 * 8
    assert [entry.num_homes for entry in ranks] == [32] * 8 + [0, 0]
    for entry in ranks:
        held = entry.dense_bytes + entry.cache_bytes + entry.buffer_bytes
        held += entry.num_slots * entry.slot_bytes
        assert held <= entry.usable_bytes < entry.device_bytes
        assert entry.usable_bytes < held + entry.slot_bytes
        assert entry.fits
    # An int4 expert of Mixtral: 176 million weights of half a byte, and their scales.
    assert ranks[0].slot_bytes == pytest.approx(88e6, rel=0.04)


def test_what_does_not_fit_is_said_with_its_size() -> None:
    plan = make_plan(wish(batch=4, prompt=128))
    assert all(not entry.fits and entry.missing_bytes for entry in plan.memory)
    assert plan.layouts[0].problem.startswith("needs ")
    assert not plan.expert_parallel_is_right
    assert plan.verdict.startswith("expert parallelism does not fit (needs")
    nothing = make_plan(wish(model="mixtral-8x22b", gpus=2))
    assert nothing.best == ""
    assert nothing.verdict.startswith("nothing fits")


def test_what_does_not_fit_takes_turns_where_a_layer_fits() -> None:
    """Ten cards of 11 GB and Mixtral-8x7B as it is: 84 GiB of experts, homes on all ten."""
    plan = make_plan(wish(batch=4, prompt=128, spares=2))
    tier = plan.host_tier
    assert tier is not None
    assert (tier.num_homes, tier.host_bytes) == (26, 256 * 3 * 4096 * 14336 * 2)
    assert 1 <= tier.num_slots == plan.memory[0].num_slots < tier.num_homes
    out = io.StringIO()
    render(plan, Console(file=out, width=200))
    assert f"{tier.num_slots} slots for up to 26 experts" in out.getvalue()
    assert make_plan(INT4).host_tier is None
    assert make_plan(wish(model="mixtral-8x22b", gpus=2)).host_tier is None


def test_experts_touched() -> None:
    lite = wish(model="qwen3-30b-a3b")
    one = touched(lite, 1, 1)
    assert (one.experts, one.pairs) == (8, 8)
    many = touched(lite, 4096, 1)
    assert (many.experts, many.pairs) == (128, pytest.approx(8 * 4096))
    spread = touched(lite, 4096, 10)
    assert 12 < spread.experts <= 13
    assert 1.0 <= spread.pairs / (8 * 4096 / 10) < 1.2
    assert touched(lite, 0, 10).pairs == 0


def test_bytes_of_an_exchange() -> None:
    choice, rows, results = exchange_matrices(INT4, [1.0] + [0.0] * 9)
    # Two experts of eight over ten ranks: C(7.2, 2) / C(8, 2) miss a rank.
    hit = 1 - (7.2 * 6.2) / (8 * 7)
    assert rows[0, 1] == pytest.approx(hit * 4096 * 2)
    assert results[1, 0] == pytest.approx(2 / 10 * 4096 * 2)
    assert choice[0, 1] == 2 * 2
    for matrix in (choice, rows, results):
        assert matrix.trace() == 0
    assert rows[1:].sum() == results[:, 1:].sum() == 0


def test_one_sequence_on_pcie_is_better_off_without_an_exchange() -> None:
    plan = make_plan(wish(model="deepseek-v2-lite", quantization="int4", batch=1))
    assert not plan.expert_parallel_is_right
    assert plan.best == "one card"
    assert "wrong choice for 1 sequence here" in plan.verdict
    assert "--gpus 1" in plan.verdict
    split = make_plan(wish(model="qwen3-30b-a3b", quantization="int4", batch=1))
    assert split.best == "layer split"
    assert "three exchanges in each of 48 layers" in split.verdict


def test_many_sequences_are_better_off_with_expert_parallelism() -> None:
    for asked in (INT4, wish(topology="8xh200-nvlink", gpus=8, batch=256)):
        plan = make_plan(asked)
        assert plan.expert_parallel_is_right
        assert plan.best == "expert parallel"


def test_predictions_near_what_was_measured() -> None:
    """vLLM 0.24 on 8 x H200, mixtral-8x7b bf16, TP8: prefill 100,000 tokens/s; decode 10,600 at
    batch 64, 35,900 at 256."""
    for batch, decode in ((64, 10_600), (256, 35_900)):
        layouts = all_layouts(wish(topology="8xh200-nvlink", gpus=8, batch=batch))
        tensor = next(layout for layout in layouts if layout.name == "tensor parallel")
        assert tensor.decode_tokens_per_second == pytest.approx(decode, rel=0.3)
        assert not tensor.problem


def test_heads_that_cannot_be_cut() -> None:
    tensor = next(layout for layout in all_layouts(INT4) if layout.name == "tensor parallel")
    assert tensor.problem == "32 heads cannot be cut over 10 ranks"


def test_one_rank_alone_exchanges_nothing() -> None:
    alone = wish(topology="8xh200-nvlink", gpus=1, batch=8)
    assert [layout.name for layout in all_layouts(alone)] == ["expert parallel", "one card"]
    ours, card = all_layouts(alone)
    assert ours.link_bytes_per_step == 0
    assert ours.decode_step_seconds == pytest.approx(card.decode_step_seconds, rel=0.01)
    assert one_card(alone).rank_bytes == card.rank_bytes


def test_replicas_of_the_whole_model_serve_side_by_side() -> None:
    asked = wish(topology="8xh200-nvlink", gpus=8, batch=64)
    each = one_card(replace(asked, batch=8))
    assert replicate(asked).decode_tokens_per_second == pytest.approx(
        8 * each.decode_tokens_per_second
    )


def test_cpu_ranks_share_the_cores() -> None:
    cpu = wish(model="mixtral-lite", topology="cpu-10", batch=10, prompt=64)
    assert cpu.slowest.flops_per_second == pytest.approx(0.4 * 54.2e9)
    assert cpu.element_bytes == 4
    assert usable_bytes(cpu) < cpu.topology.device(0).memory_bytes


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_more_bandwidth_is_never_slower(batch: int) -> None:
    asked = wish(quantization="int4", batch=batch)
    links = {
        name: replace(link, up_bytes_per_second=1e12, down_bytes_per_second=1e12)
        for name, link in asked.topology.links.items()
    }
    faster = replace(asked, topology=replace(asked.topology, links=links))
    assert expert_parallel(faster).decode_step_seconds <= expert_parallel(asked).decode_step_seconds


@pytest.mark.parametrize(("name", "value"), [("batch", 0), ("prompt", 2**21), ("spares", 10)])
def test_wishes_out_of_bounds(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=name):
        replace(INT4, **{name: value})


def test_the_plan_as_text_and_as_json() -> None:
    plan = make_plan(INT4)
    out = io.StringIO()
    render(plan, Console(file=out, width=160))
    for words in ("mixtral-8x7b on 10x2080ti-pcie", "0-7", "8-9", "tensor parallel", plan.verdict):
        assert words in out.getvalue().replace("\n", " ")
    figures = json.loads(json.dumps(plan.to_json()))
    assert len(figures["memory"]) == 10
    assert figures["layouts"][0]["name"] == "expert parallel"
