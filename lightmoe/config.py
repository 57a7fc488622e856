"""What a user may choose for a launch: one frozen record, from flags over a recipe over defaults.

It only checks what can be known without machine or model; `auto` is resolved in worker/resolve.py.
"""

from __future__ import annotations

import difflib
import re
import sysconfig
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

from lightmoe.errors import UsageError

Device = Literal["auto", "cuda", "cpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PlacementStyle = Literal["spare", "spread"]
Transport = Literal["auto", "local", "gloo", "nccl", "copy_engine"]
PeerMemory = Literal["auto", "device", "host"]
Payload = Literal["full", "int8"]
OverlapStyle = Literal["auto", "off", "halves"]
Route = Literal["waterfill", "even", "none"]
Overflow = Literal["none", "redirect", "drop"]
LoadFormat = Literal["auto", "dummy"]
OnOff = Literal["on", "off"]

MAX_RANKS = 1024
MAX_SKEW = 10.0

_INTEGER_BOUNDS: dict[str, tuple[int, int]] = {
    "gpus": (1, MAX_RANKS),
    "spares": (0, MAX_RANKS - 1),
    "max_model_len": (1, 2**24),
    "max_num_seqs": (1, 2**14),
    "max_num_batched_tokens": (1, 2**20),
    "seed": (0, 2**63 - 1),
    "port": (0, 65535),
    "free_slots": (0, 2**10),
    "expert_slots": (1, 2**20),
    "rebalance_interval": (0, 2**31 - 1),
    "migration_bytes_per_step": (2**10, 2**32),
}
CAPACITY_FACTOR = 1.25
"""Unless --capacity-factor says otherwise."""

_NUMBER_BOUNDS: dict[str, tuple[float, float]] = {"capacity_factor": (1, 1000)}
_BYTE_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Everything that `lightmoe launch` and `LLM(...)` take; fields are named as the flags.

    | field | meaning |
    |---|---|
    | model | a model folder, or a name looked up in `data_folders("models")` |
    | gpus | number of ranks: GPUs, or processes where the device is the CPU |
    | spares | ranks that hold replicas only; None: 2 from four ranks up, else 0 |
    | placement | "spare": homes and spares; "spread": all ranks alike |
    | topology | the machine's figures: a file or its name; "auto": measured of these very cards |
    | peer_memory | where copy_engine's ranks meet: on the cards, or in pinned memory of the host |
    | overlap | "auto": as the stages, timed at the start, say; "halves": every larger step in two |
    | payload | rows as they are, or as int8 between copy_engine's ranks: half the bytes |
    | route | how tokens are split over the replicas of an expert |
    | overflow | pairs beyond a rank's capacity, tokens change: to other experts, or dropped |
    | capacity_factor | the capacity as a multiple of the mean load of a layer in a step |
    | deterministic | "on": a request's tokens depend on itself only, not on what runs beside it |
    | max_model_len | tokens of prompt and answer together; None: what the model says |
    | max_num_seqs, max_num_batched_tokens | per rank and step |
    | oversubscribe | several ranks a GPU, for trying out what many GPUs do; means "cuda" |
    | gpu_memory_utilization | the share of a GPU's free memory that its ranks use |
    | memory_limit | per rank, for weights and KV cache, such as "11GiB"; None: no limit of ours |
    | port | 0 takes any free one |
    | address | a running Ray cluster; None starts a local one that ends with the launch |
    | free_slots | slots that a rank keeps empty for experts on their way; one rank alone has none |
    | expert_slots | slots of a rank for its experts, in turns; None: for all, on GPUs what fits |
    | rebalance_interval | steps between two plans; 0: the placement stays as it is |
    | migration_bytes_per_step | what a rank may send, and get, of experts beside one step |
    | host_copy | "on": experts that move come from the node's host memory, not from other ranks |
    | record_routing | a .npz file for what every token's gate chose; None: not recorded |
    | routing_skew | for benchmarks: experts at random, "uniform" or "zipf:1.0", not the gate's |
    | trace | a folder for a trace of a few early steps; None: none is recorded |
    """

    model: str
    gpus: int
    device: Device = "auto"
    dtype: Dtype = "auto"
    spares: int | None = None
    placement: PlacementStyle = "spare"
    transport: Transport = "auto"
    topology: str = "auto"
    peer_memory: PeerMemory = "auto"
    payload: Payload = "full"
    overlap: OverlapStyle = "auto"
    route: Route = "waterfill"
    overflow: Overflow = "none"
    capacity_factor: float = CAPACITY_FACTOR
    load_format: LoadFormat = "auto"
    deterministic: OnOff = "on"
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    oversubscribe: bool = False
    gpu_memory_utilization: float = 0.9
    memory_limit: str | None = None
    served_model_name: str | None = None
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    address: str | None = None
    free_slots: int = 1
    expert_slots: int | None = None
    rebalance_interval: int = 256
    migration_bytes_per_step: int = 4 << 20
    host_copy: OnOff = "off"
    record_routing: str | None = None
    routing_skew: str | None = None
    trace: str | None = None

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            _check_value(name, getattr(self, name), kind)
        self._check_ranks()
        self._check_overflow()
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}); every running sequence needs one token a step"
            )
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit, name="memory_limit")
        if self.routing_skew is not None:
            parse_skew(self.routing_skew)
        if self.record_routing is not None and self.overlap == "halves":
            raise UsageError(
                "record_routing takes each layer's tokens at once, and overlap halves runs them in"
                " two; leave one of the two out"
            )

    def _check_ranks(self) -> None:
        if self.placement == "spread" and self.spares is not None:
            raise UsageError(
                f"spares ({self.spares}) has no meaning with placement spread, where all ranks are "
                "alike; leave one of the two out"
            )
        if self.num_spares >= self.gpus:
            raise UsageError(
                f"spares ({self.num_spares}) leaves no home rank of gpus ({self.gpus}); "
                f"at least one home rank is needed: give at most {self.gpus - 1} spares"
            )
        if self.rebalances and not self.free_slots:
            raise UsageError(
                "free_slots (0) leaves no slot for an expert on its way; give at least 1, or"
                " rebalance_interval 0"
            )
        if self.transport == "local" and self.gpus > 1:
            raise UsageError(
                f"transport local joins one rank only and gpus is {self.gpus}; take auto or gloo"
            )
        if self.expert_slots is not None and self.host_tier_obstacle is not None:
            flag, reason = self.host_tier_obstacle
            raise UsageError(
                f"expert_slots ({self.expert_slots}) and {flag} exclude each other, since {reason};"
                " leave one out"
            )
        if self.payload == "int8" and self.deterministic == "on":
            raise UsageError(
                "payload int8 rounds what travels between ranks, and deterministic is on;"
                " give deterministic off as well, or payload full"
            )
        if self.oversubscribe and self.device == "cpu":
            raise UsageError("oversubscribe means several ranks a GPU; leave out device cpu")
        if self.oversubscribe and self.address is not None:
            raise UsageError("oversubscribe is for the GPUs of one machine; leave out address")

    def _check_overflow(self) -> None:
        if self.overflow == "none":
            if self.capacity_factor != CAPACITY_FACTOR:
                raise UsageError(
                    f"capacity_factor ({self.capacity_factor}) has no meaning with overflow none;"
                    " give overflow redirect or drop, or leave it out"
                )
            return
        if self.deterministic == "on":
            raise UsageError(
                f"overflow {self.overflow} makes tokens depend on what else runs, and deterministic"
                " is on; give deterministic off as well, or overflow none"
            )
        if self.overflow == "drop" and self.record_routing is not None:
            raise UsageError(
                "record_routing has as many experts for every token, and overflow drop leaves some"
                " with fewer; leave one of the two out"
            )

    @property
    def num_spares(self) -> int:
        """Ranks that hold replicas only: the last ones."""
        if self.placement == "spread":
            return 0
        if self.spares is None:
            return 2 if self.gpus >= 4 and self.expert_slots is None else 0
        return self.spares

    @property
    def num_homes(self) -> int:
        """Ranks that hold the first slot of some expert."""
        return self.gpus - self.num_spares

    @property
    def num_free_slots(self) -> int:
        """Slots that every rank keeps empty."""
        return self.free_slots if self.gpus > 1 and self.expert_slots is None else 0

    @property
    def rebalances(self) -> bool:
        """Whether a balancer runs: a rank alone, and slots with turns, have nothing to balance."""
        return self.gpus > 1 and self.rebalance_interval > 0 and self.expert_slots is None

    @property
    def host_tier_obstacle(self) -> tuple[str, str] | None:
        """What was asked for that keeps experts from living in the host's memory, and why."""
        if self.spares:
            return f"spares ({self.spares})", "spares hold replicas, and every slot is for a home"
        if self.transport == "copy_engine":
            return "transport copy_engine", "no host knows there which experts to fetch"
        if self.peer_memory != "auto":
            flag = f"peer_memory {self.peer_memory}"
            return flag, "copy_engine meets there, and no host knows then what to fetch"
        if self.payload == "int8":
            return "payload int8", "copy_engine carries it, and no host knows there what to fetch"
        if self.overlap == "halves":
            return "overlap halves", "one half's experts would displace the other's"
        if self.host_copy == "on":
            return "host_copy on", "that is for experts that move, and these stay at their homes"
        return None

    @property
    def memory_limit_bytes(self) -> int | None:
        """`memory_limit` in bytes per rank."""
        return None if self.memory_limit is None else parse_bytes(self.memory_limit)

    @classmethod
    def from_recipe(cls, recipe: str | Path | None, overrides: Mapping[str, object]) -> Self:
        """Merge `overrides` (the flags that were given; None counts as not given) over a recipe.

        Raises UsageError for an unreadable recipe, an unknown key or a value out of range.
        """
        values = {} if recipe is None else load_recipe(recipe)
        _check_keys(overrides, "the arguments")
        values |= {name: value for name, value in overrides.items() if value is not None}
        for required in (item.name for item in fields(cls) if _is_required(item)):
            if required not in values:
                raise UsageError(
                    f"{required} is missing; give --{required}, or a recipe that sets it"
                )
        return cls(**values)


def load_recipe(recipe: str | Path) -> dict[str, Any]:
    """Read a TOML recipe: a path, or a name looked up in `data_folders("launch")`.

    Raises UsageError where it is missing, is no TOML, or has a key that LaunchConfig lacks.
    """
    path = find_data_file("launch", recipe)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not valid TOML: {error}") from error
    except OSError as error:
        raise UsageError(f"recipe {path} cannot be read: {error.strerror}") from error
    _check_keys(values, f"recipe {path}")
    return values


def data_folders(kind: Literal["models", "launch", "topology"]) -> list[Path]:
    """Folders where a name is looked up, best first: ./kind, the checkout's, the installed ones."""
    checkout = Path(__file__).resolve().parents[1]
    folders = [Path.cwd() / kind]
    if (checkout / "pyproject.toml").is_file():
        folders.append(checkout / kind)
    for scheme in (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user")):
        folders.append(Path(sysconfig.get_path("data", scheme)) / "share" / "lightmoe" / kind)
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def parse_bytes(text: str, name: str = "size") -> int:
    """Read "11GiB", "512MiB", "1.5GB" or "1048576" as a number of bytes; raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip(), flags=re.ASCII)
    factor = _BYTE_UNITS.get(match[2]) if match else None
    num_bytes = int(float(match[1]) * factor) if match and factor else 0
    if num_bytes < 1:
        raise UsageError(f'{name} is {text!r}; give a size such as "11GiB" or "512MiB"')
    return num_bytes


def parse_skew(text: str) -> float:
    """The exponent s of "zipf:s", experts drawn with weights 1 / i^s; 0 of "uniform"."""
    match = re.fullmatch(r"zipf:(\d+(?:\.\d+)?)", text, flags=re.ASCII)
    if text != "uniform" and not (match and float(match[1]) <= MAX_SKEW):
        raise UsageError(
            f'routing_skew is {text!r}; give "uniform", or "zipf:1.0" with a number up to'
            f" {MAX_SKEW:g}"
        )
    return float(match[1]) if match else 0.0


def find_data_file(kind: Literal["launch", "topology"], name: str | Path) -> Path:
    """A TOML file: a path, or a name looked up in `data_folders(kind)`; else a UsageError."""
    path = Path(name)
    if path.exists() or path.parent != Path():
        return path
    folders = data_folders(kind)
    candidates = [folder / f"{path.name.removesuffix('.toml')}.toml" for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted({file.stem for folder in folders for file in folder.glob("*.toml")})
    what = "recipe" if kind == "launch" else kind
    raise UsageError(
        f"{what} {str(name)!r} is no file here and no known name; "
        f"give a path, or one of: {', '.join(known) or 'none found'}"
    )


def _check_keys(names: Iterable[str], source: str) -> None:
    known = [item.name for item in fields(LaunchConfig)]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
            raise UsageError(f"unknown key {name!r} in {source}; {remedy}")


def _check_value(name: str, value: object, kind: Any) -> None:
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UsageError(f"{name} is {value!r}; give one of: {', '.join(get_args(kind))}")
    elif kind is bool:
        if not isinstance(value, bool):
            raise UsageError(f"{name} is {value!r}; give true or false")
    elif kind is float and name in _NUMBER_BOUNDS:
        least, most = _NUMBER_BOUNDS[name]
        number = not isinstance(value, bool) and isinstance(value, (int, float))
        if not number or not least <= cast(float, value) <= most:
            raise UsageError(f"{name} is {value!r}; give a number from {least} to {most}")
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise UsageError(f"{name} is {value!r}; give a number above 0 and up to 1")
    elif kind is int:
        low, high = _INTEGER_BOUNDS[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UsageError(f"{name} is {value!r}; give an integer from {low} to {high}")
    elif not isinstance(value, str) or not value:
        raise UsageError(f"{name} is {value!r}; give a text that is not empty")


def _is_required(item: Any) -> bool:
    return item.default is MISSING and item.default_factory is MISSING
