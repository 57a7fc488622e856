"""`lightmoe replay` and `simulate` as command lines. What they run is imported when they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lightmoe.config import find_data_file, parse_skew


def replay(
    trace: Path,
    /,
    *,
    gpus: int = 10,
    spares: int | None = None,
    placement: Literal["spare", "spread"] = "spare",
    route: Annotated[list[str] | None, Parameter(negative=())] = None,
    slots_per_spare: int | None = None,
    replica_slots: int | None = None,
    replan_every: int | None = None,
    expert_bytes: int | None = None,
    pair_microseconds: float | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
    plot: Path | None = None,
) -> None:
    """Route a recorded trace again under plans made from its past steps, and compare the routes.

    Parameters
    ----------
    trace
        An .npz that launch --record-routing wrote.
    spares
        Ranks that hold replicas only. Default: 2 from four ranks up.
    placement
        spare: homes and spares; spread: all ranks alike.
    route
        none, even, waterfill, lp: several times, or with commas. Default: all of them.
    slots_per_spare
        Slots a spare and layer, for --placement spare. Default: for a quarter of the experts.
    replica_slots
        Slots for replicas a layer, over all ranks, for --placement spread. Default: as many in all.
    replan_every
        Steps between two plans. Default: 8.
    expert_bytes
        Size of one expert of one layer. Default: Mixtral-8x7B's in 16 bits.
    pair_microseconds
        Time of one expert for one token. Default: the same on an RTX 2080 Ti.
    json_file
        Write {route: {max_over_mean, max_over_mean_p95, moved_bytes}} there.
    plot
        Draw the steps and the predicted times: a .png.
    """
    from lightmoe.balancer.replay_command import ReplayOptions, run

    options: dict[str, Any] = {
        "routes": None if route is None else tuple(",".join(route).split(",")),
        "replan_every": replan_every,
        "expert_bytes": expert_bytes,
        "pair_microseconds": pair_microseconds,
    }
    given = {name: value for name, value in options.items() if value is not None}
    run(
        trace,
        ReplayOptions(
            gpus=gpus,
            spares=spares,
            placement=placement,
            slots_per_spare=slots_per_spare,
            replica_slots=replica_slots,
            **given,
        ),
        json_file,
        plot,
    )


def simulate(
    *,
    topology: str,
    gpus: int,
    model: str | None = None,
    tokens_per_rank: int = 4096,
    chunks: int = 4,
    micro_batches: int = 1,
    layers: int = 1,
    routing_skew: str = "uniform",
    transport: Literal["nccl", "copy_engine", "gloo"] | None = None,
    quantization: Literal["none", "int8", "int4"] = "none",
    seed: int = 0,
    calibrate: Path | None = None,
    json_output: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Simulate the pipeline of MoE layers on a described machine, shared links included.

    Parameters
    ----------
    topology
        A TOML file, or the name of one in topology/.
    gpus
        Number of ranks, the first of the topology.
    model
        As of launch; config.json is enough. Not needed with --calibrate alone.
    layers
        Several layers, or two micro-batches, have attention before each.
    routing_skew
        As of launch: uniform, or zipf:1.0.
    transport
        How rows travel. Default: what launch would take, by the topology's figures.
    calibrate
        Measured layers (.json) to fit the free parameters to; prints how wrong the others are.
    json_output
        Print JSON.
    """
    from lightmoe.balancer.simulation import Question, answer
    from lightmoe.models.config import read_config
    from lightmoe.models.find import find_model
    from lightmoe.topology import read_topology

    machine = read_topology(find_data_file("topology", topology)).first(gpus)
    lines, figures = answer(
        Question(
            topology=machine,
            model=None if model is None else read_config(find_model(model)),
            model_name="" if model is None else Path(model).name,
            tokens_per_rank=tokens_per_rank,
            chunks=chunks,
            micro_batches=micro_batches,
            layers=layers,
            skew=parse_skew(routing_skew),
            transport=transport,
            quantization=quantization,
            seed=seed,
            measured=calibrate,
        )
    )
    print(json.dumps(figures, indent=2) if json_output else "\n".join(lines))
