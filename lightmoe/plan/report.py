"""The plan as a whole: memory, layouts side by side, and which of them is the right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lightmoe.plan.layouts import Layout, all_layouts
from lightmoe.plan.memory import HostTier, Memory, Wish, host_tier, memory_map
from lightmoe.plan.stages import launch_transport

_GIB = 1 << 30
_CLEARLY = 1.2  # a roofline is no better than that


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Memory of every rank, all layouts (expert parallel first), and the verdict in words.

    `host_tier` says how a launch has experts take turns where their homes do not fit.
    """

    title: str
    memory: Sequence[Memory]
    layouts: Sequence[Layout]
    best: str
    expert_parallel_is_right: bool
    verdict: str
    transport: str
    host_tier: HostTier | None

    def to_json(self) -> dict[str, Any]:
        """Everything, under the names of the fields."""
        return asdict(self)


def _weights(wish: Wish) -> str:
    if wish.quantization == "none":
        return "as they are"
    return f"{wish.quantization} (looking ahead: `launch` has no --quantization yet)"


def make_plan(wish: Wish) -> Plan:
    """Compute it; nothing is started."""
    memory = memory_map(wish)
    layouts = all_layouts(wish)
    best, verdict = judge(wish, layouts)
    return Plan(
        title=(
            f"{wish.model_name} on {wish.topology.name}: {wish.num_ranks} ranks, experts"
            f" {_weights(wish)},"
            f" {_sequences(wish)} of {wish.prompt} tokens"
        ),
        memory=memory,
        layouts=layouts,
        best=best.name if best else "",
        expert_parallel_is_right=best is layouts[0],
        verdict=verdict,
        transport=_transport(wish),
        host_tier=host_tier(wish) if layouts[0].problem else None,
    )


def _transport(wish: Wish) -> str:
    choice = launch_transport(wish)
    return "local: one rank" if choice is None else f"{choice.way.label}: {choice.reason}"


def judge(wish: Wish, layouts: Sequence[Layout]) -> tuple[Layout | None, str]:
    """The best layout that can be, by decode rate, and a sentence; none if nothing fits.

    Expert parallelism is right unless something is clearly faster.
    """
    ours, possible = layouts[0], [layout for layout in layouts if not layout.problem]
    if not possible:
        return None, (
            f"nothing fits: expert parallelism {ours.problem};"
            " quantise, take more ranks, or fewer and shorter sequences"
        )
    fastest = max(possible, key=lambda layout: layout.decode_tokens_per_second)
    if ours.problem:
        return fastest, f"expert parallelism does not fit ({ours.problem}); {_rate(fastest)}"
    ratio = fastest.decode_tokens_per_second / ours.decode_tokens_per_second
    if fastest is ours or ratio < _CLEARLY:
        return ours, f"expert parallelism is the right choice: {_rate(ours)}"
    return fastest, (
        f"expert parallelism is the wrong choice for {_sequences(wish)} here:"
        f" {_rate(ours)} against {_rate(fastest)}, {ratio:.1f}x; {_why(wish, fastest)}"
    )


def _sequences(wish: Wish) -> str:
    return "1 sequence" if wish.batch == 1 else f"{wish.batch} sequences"


def _rate(layout: Layout) -> str:
    return f"{layout.name} decodes {layout.decode_tokens_per_second:,.0f} tokens/s"


def _why(wish: Wish, fastest: Layout) -> str:
    if fastest.name in ("one card", "replicate"):
        remedy = "--gpus 1" if fastest.name == "one card" else "one launch --gpus 1 on every card"
        return f"the model fits one card, where nothing is exchanged: {remedy}"
    layers = len(wish.model.moe_layers)
    return f"three exchanges in each of {layers} layers cost more than they save at this batch"


def render(plan: Plan, console: Console) -> None:
    """Print the plan as two tables and the verdict."""
    memory = Table(
        "rank", "device", "dense", "slots", "KV cache", "buffers", "free", title=plan.title
    )
    for first, last, entry in _alike(plan.memory):
        used = entry.dense_bytes + entry.cache_bytes + entry.buffer_bytes
        slots = entry.num_slots * entry.slot_bytes
        memory.add_row(
            str(first) if first == last else f"{first}-{last}",
            _gib(entry.device_bytes),
            _gib(entry.dense_bytes),
            f"{entry.num_slots} ({entry.num_homes} homes) x {entry.slot_bytes / 2**20:.1f} MiB"
            f" = {_gib(slots)}",
            _gib(entry.cache_bytes),
            _gib(entry.buffer_bytes),
            _gib(entry.usable_bytes - used - slots)
            if entry.fits
            else f"lacks {_gib(entry.missing_bytes)}",
        )
    console.print(memory)
    rates = Table(
        "layout",
        "GiB a rank",
        "prefill tokens/s",
        "decode tokens/s",
        "decode step",
        "over links a step",
        "",
    )
    for layout in plan.layouts:
        rates.add_row(
            f"[bold]{layout.name}[/]" if layout.name == plan.best else layout.name,
            f"{layout.rank_bytes / _GIB:.1f}",
            f"{layout.prefill_tokens_per_second:,.0f}",
            f"{layout.decode_tokens_per_second:,.0f}",
            f"{layout.decode_step_seconds * 1e3:.2f} ms",
            f"{layout.link_bytes_per_step / 2**20:.2f} MiB",
            layout.problem or layout.note,
            style="dim" if layout.problem else "",
        )
    console.print(rates)
    console.print(f"launch --transport auto: {plan.transport}", highlight=False)
    if plan.host_tier is not None:
        console.print(_host_tier_line(plan.host_tier), highlight=False)
    console.print(
        f"{plan.verdict}. Predicted by roofline from the topology's figures.", highlight=False
    )


def _host_tier_line(tier: HostTier) -> str:
    return (
        f"Experts can take turns all the same: launch gives each rank {tier.num_slots} slots for up"
        f" to {tier.num_homes} experts, all ranks are homes, and the host keeps"
        f" {_gib(tier.host_bytes)} of experts; without copy_engine and CUDA graphs. What it waits"
        " for experts is not predicted."
    )


def _alike(memory: Sequence[Memory]) -> list[tuple[int, int, Memory]]:
    """Consecutive ranks with the same memory as (first, last, one of them)."""
    groups: list[tuple[int, int, Memory]] = []
    for entry in memory:
        if groups and {**asdict(groups[-1][2]), "rank": 0} == {**asdict(entry), "rank": 0}:
            groups[-1] = (groups[-1][0], entry.rank, groups[-1][2])
        else:
            groups.append((entry.rank, entry.rank, entry))
    return groups


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
