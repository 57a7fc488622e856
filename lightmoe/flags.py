"""The flags of launch, which other commands take as well: LaunchConfig's fields."""

from __future__ import annotations

from dataclasses import asdict, field, fields, make_dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import Parameter

from lightmoe.config import LaunchConfig

_HELP = {
    "model": "A model folder, or a name in ./models, the installed models or $LIGHTMOE_MODELS.",
    "gpus": "Number of ranks: GPUs, or processes where the device is the CPU.",
    "device": "auto takes the GPUs where there is one for each rank, else the CPU, and says why.",
    "dtype": "auto is float32 on a CPU, float16 on Turing, bfloat16 from Ampere on.",
    "spares": "Ranks that hold replicas only. Default: 2 from four ranks up, 0 with expert-slots.",
    "placement": "spare: homes and spares; spread: all ranks alike.",
    "transport": "How rows travel between ranks; auto: gloo on CPUs, on GPUs as figures say.",
    "topology": "Figures of this machine, TOML; auto: a file of topology/ with these very cards.",
    "overlap": "Exchange behind compute: auto times both and decides; off; halves: always in two.",
    "peer_memory": "Where copy_engine meets: auto takes the cards where they reach each other.",
    "payload": "Rows between ranks (copy_engine); int8: half the bytes, rounded.",
    "route": "How tokens are split over the replicas of an expert.",
    "overflow": "Pairs over a rank's capacity: to the next-best expert, or dropped; tokens change.",
    "capacity_factor": "The most that a rank gets of a layer with --overflow, over the mean load.",
    "load_format": "dummy makes weights up: config.json is enough, prompts are token ids.",
    "deterministic": "on: the same tokens whatever runs beside a request; off: faster on a GPU.",
    "max_model_len": "Tokens of prompt and answer together. Default: what the model says.",
    "max_num_seqs": "Sequences that run at once on a rank.",
    "max_num_batched_tokens": "Tokens that a rank runs in one step.",
    "oversubscribe": "Run several ranks on each GPU: slow, to try out what many GPUs do.",
    "gpu_memory_utilization": "The share of a GPU's free memory that its ranks use.",
    "memory_limit": 'Weights and KV cache of a rank, such as "11GiB".',
    "served_model_name": "The model's name in the API.",
    "seed": "Seed of dummy weights.",
    "host": "Address to listen on.",
    "port": "Port to listen on; 0 takes a free one.",
    "api_key": "Ask clients for this key.",
    "address": "A running Ray cluster. Default: a local one that ends with the launch.",
    "trace": "Record 16 early steps of all ranks into this folder, written at the end.",
    "free_slots": "Slots of a rank kept empty for experts on their way to it.",
    "expert_slots": "Slots of a rank, the host has the rest. Default: for all; on GPUs what fits.",
    "rebalance_interval": "Steps between two plans of the balancer; 0 leaves experts in place.",
    "migration_bytes_per_step": "What a rank may send, and get, of moving experts beside one step.",
    "host_copy": "on: moving experts come from the node's host memory, not from other ranks.",
    "record_routing": "Write every token's experts to this .npz when the ranks stop.",
    "routing_skew": 'For benchmarks: experts at random, "uniform" or "zipf:1.0", not the gate\'s.',
}


def _flags_class() -> type:
    """LaunchConfig's fields, each optional: None means that the flag was not given."""
    hints = get_type_hints(LaunchConfig)
    return make_dataclass(
        "LaunchFlags",
        [
            (
                item.name,
                Annotated[hints[item.name] | None, Parameter(help=_HELP[item.name])],
                field(default=None),
            )
            for item in fields(LaunchConfig)
        ],
        namespace={"__module__": __name__},
    )


if TYPE_CHECKING:
    LaunchFlags = SimpleNamespace
else:
    LaunchFlags = _flags_class()

Flags = Annotated[LaunchFlags, Parameter(name="*")]
NO_FLAGS = LaunchFlags()


def given_flags(flags: Any) -> dict[str, Any]:
    """Those that were given, by name."""
    return {name: value for name, value in asdict(flags).items() if value is not None}
