"""The command line. Exit codes: 0 a clean stop, 1 what fails at run time, 2 wrong usage."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, field, fields, make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from lightmoe import __version__
from lightmoe.config import LaunchConfig, find_data_file, parse_skew
from lightmoe.errors import LightMoEError, UsageError

if TYPE_CHECKING:
    from lightmoe.models.model_config import ModelConfig
    from lightmoe.topology import Topology
    from lightmoe.worker.ray_group import Progress

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

app = App(
    name="lightmoe",
    help="Serve Mixture-of-Experts models, experts spread over any number of GPUs or processes.",
    version=__version__,
    suppress_keyboard_interrupt=False,
)


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
_NO_FLAGS = LaunchFlags()


@app.command
def launch(recipe: str | None = None, /, *, flags: Flags = _NO_FLAGS) -> None:
    """Start the ranks and serve, until Ctrl-C.

    Parameters
    ----------
    recipe
        A TOML file with these flags' names as keys, or the name of one in launch/.
    """
    console = Console(stderr=True)
    config = LaunchConfig.from_recipe(recipe, _given(flags))
    from lightmoe.launch import serve

    with _progress(console) as progress:
        serve(
            config,
            progress,
            announce=lambda line: console.print(line, highlight=False, soft_wrap=True),
        )


@app.command
def generate(
    prompt: str,
    *,
    url: str | None = None,
    api_key: str | None = None,
    max_tokens: int = 128,
    temperature: float | None = None,
    model: str = "mixtral-lite",
    gpus: int = 1,
    seed: int | None = None,
) -> None:
    """Continue a prompt and print it: by a running server (--url), or by ranks started for it.

    Parameters
    ----------
    prompt
        The text to continue.
    url
        A running server, such as http://127.0.0.1:8000.
    """
    sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if url is not None:
        from lightmoe.client import Client

        with Client(url, api_key=api_key) as client:
            _print_stream(prompt, client.stream(prompt, **sampling))
        return
    from dataclasses import replace

    from lightmoe.llm import LLM

    with (
        _progress(Console(stderr=True)) as progress,
        LLM(model, gpus=gpus, progress=progress) as llm,
    ):
        (output,) = llm.generate(prompt, replace(llm.default_sampling_params(), **sampling))
        _print_stream(prompt, [output.outputs[0].text])


@app.command
def chat(
    *,
    url: str = "http://127.0.0.1:8000",
    api_key: str | None = None,
    max_tokens: int = 256,
    temperature: float | None = None,
) -> None:
    """Talk with a running server; an empty line or Ctrl-D ends it."""
    from lightmoe.client import Client

    sampling: dict[str, Any] = {"max_tokens": max_tokens}
    if temperature is not None:
        sampling["temperature"] = temperature
    messages: list[dict[str, str]] = []
    with Client(url, api_key=api_key) as client:
        client.health()
        while (text := _read_line()) is not None:
            messages.append({"role": "user", "content": text})
            pieces = []
            for piece in client.stream(messages, **sampling):
                pieces.append(piece)
                print(piece, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": "".join(pieces)})


@app.command
def heatmap(
    trace: Path | None = None,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("load.png"),
    url: str | None = None,
    api_key: str | None = None,
    gpus: int | None = None,
    spares: int | None = None,
    placement: Literal["spare", "spread"] | None = None,
    slots_per_spare: int | None = None,
    replica_slots: int | None = None,
    replan_every: int | None = None,
) -> None:
    """Draw the expert load of a running server, or of a recorded trace before and after balancing.

    Parameters
    ----------
    trace
        An .npz that launch --record-routing wrote; gpus and what follows are for it, as of replay.
    output
        The file to write: .png, and for a server also .npz or .json.
    url
        The server. Default: http://127.0.0.1:8000.
    """
    replayed = {
        "gpus": gpus,
        "spares": spares,
        "placement": placement,
        "slots_per_spare": slots_per_spare,
        "replica_slots": replica_slots,
        "replan_every": replan_every,
    }
    given = {name: value for name, value in replayed.items() if value is not None}
    if trace is None:
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise UsageError(f"--{flag} is for a recorded trace; give its .npz, or leave it out")
        _save_load(url or "http://127.0.0.1:8000", api_key, output)
    else:
        if url is not None:
            raise UsageError(f"--url {url} and the trace {trace}; give one of the two")
        from lightmoe.balancer.before_after import save_before_and_after
        from lightmoe.balancer.replay_command import ReplayOptions

        options: dict[str, Any] = {"gpus": 10, **given}
        save_before_and_after(trace, ReplayOptions(**options), output)
    print(output)


def _save_load(url: str, api_key: str | None, output: Path) -> None:
    """What a server has counted, as a file."""
    from lightmoe.client import Client
    from lightmoe.telemetry.heatmap import load_table_from_json, save

    with Client(url, api_key=api_key) as client:
        save(load_table_from_json(client.expert_load()), output)


@app.command
def profile(
    recipe: str | None = None,
    /,
    *,
    phase: Literal["prefill", "decode"] = "prefill",
    steps: int = 3,
    batch: int = 4,
    prompt_tokens: int = 128,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("profile"),
    nsys: bool = False,
    nsys_path: str | None = None,
    under_nsys: Annotated[bool, Parameter(show=False)] = False,
    flags: Flags = _NO_FLAGS,
) -> None:
    """Run a workload, record a few steps, and say how much communication they hide.

    Takes the flags of launch.

    Parameters
    ----------
    recipe
        As of launch.
    phase
        What the recorded steps do: whole prompts, or one token of every sequence.
    steps
        How many steps to record.
    batch
        Sequences on each rank in a step.
    prompt_tokens
        Tokens of each prompt.
    output
        The folder for trace.json.gz (for ui.perfetto.dev), overlap.json and timeline.png.
    nsys
        Run under NVIDIA's nsys, and leave its report there too.
    nsys_path
        Where nsys is, if not on the PATH.
    """
    from lightmoe import profile as profiling

    workload = profiling.Workload(
        phase=phase, steps=steps, batch=batch, prompt_tokens=prompt_tokens
    )
    if nsys or nsys_path is not None:
        lines = profiling.profile_with_nsys(recipe, _given(flags), workload, output, nsys_path)
    else:
        run = profiling.run_under_nsys if under_nsys else profiling.profile
        with _progress(Console(stderr=True)) as progress:
            lines = run(recipe, _given(flags), workload, output, progress)
    print(*lines, sep="\n")


@app.command
def overlap(
    report: Path,
    /,
    *,
    step_range: str = "step",
    before: Path | None = None,
    timeline: Path | None = None,
) -> None:
    """Print how much of its communication a recorded run hides, as JSON.

    Parameters
    ----------
    report
        A trace that profile or launch --trace wrote, or an export of nsys (.sqlite).
    step_range
        The NVTX range that is one step, in a report of nsys.
    before
        Another trace of the same work, to draw above this one.
    timeline
        Draw a picture, too: a .png.
    """
    from lightmoe.telemetry.overlap import headline, overlap_of, read_any
    from lightmoe.telemetry.trace_folder import save_timeline

    trace = read_any(report, step_range)
    figures = overlap_of(trace)
    print(json.dumps(figures, indent=2))
    print(headline(figures), file=sys.stderr)
    if timeline is not None:
        save_timeline(timeline, trace, None if before is None else read_any(before, step_range))
    elif before is not None:
        raise UsageError(f"--before {before} is drawn only with --timeline; give a .png")


@app.command
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


@app.command
def bench(
    recipe: str | None = None,
    /,
    *,
    url: str | None = None,
    batch_sizes: str = "1,8,32",
    prompt_lengths: str = "128,1024",
    output_length: int = 64,
    num_repeats: int = 3,
    num_warmups: int = 2,
    prompt_seed: int = 0,
    text: Path | None = None,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("bench"),
    flags: Flags = _NO_FLAGS,
) -> None:
    """Sweep batch sizes x prompt lengths: tokens/s, delays, and who is waited for.

    Against a running server (--url), or with ranks started here by the flags of launch, once for
    each of --routing-skew's names: "natural,uniform,zipf:1.0"; default: uniform,zipf:1.0.

    Parameters
    ----------
    recipe
        As of launch.
    url
        A running server, such as http://127.0.0.1:8000; its routing is as it was launched.
    batch_sizes
        Requests at once.
    prompt_lengths
        Tokens of each prompt.
    output_length
        Tokens of each answer that are measured while the whole batch decodes.
    num_repeats
        Measured runs of each cell.
    num_warmups
        Runs of each cell before.
    prompt_seed
        Seed of the prompts' random tokens.
    text
        A text to cut prompts from instead; for natural routing, with ranks started here.
    output
        The folder for bench.json and bench.png.
    """
    from lightmoe.bench import command
    from lightmoe.bench.sweep import Sweep, parse_numbers

    sweep = Sweep(
        batch_sizes=parse_numbers(batch_sizes, "batch_sizes"),
        prompt_lengths=parse_numbers(prompt_lengths, "prompt_lengths"),
        output_length=output_length,
        num_repeats=num_repeats,
        num_warmups=num_warmups,
        seed=prompt_seed,
    )
    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    run = command.Run(sweep=sweep, folder=output, text=text, say=say)
    if url is not None:
        report = command.bench_server(url, recipe, _given(flags), run)
    else:
        with _progress(console) as progress:
            report = command.bench_here(recipe, _given(flags), run, progress)
    # Rich takes 80 columns where it writes to a file.
    Console(width=None if sys.stdout.isatty() else 120).print(report.table())
    print(*command.save(report, output), sep="\n")


@app.command
def doctor(*, port: int = 8000, gpus: int = 10) -> int:
    """Look at this machine and say what is missing, with remedies."""
    from lightmoe.doctor import diagnose, exit_code, render

    findings = diagnose(port, gpus)
    render(findings)
    return exit_code(findings)


@app.command
def plan(
    *,
    model: str,
    topology: str,
    gpus: int,
    quantization: Literal["none", "int8", "int4"] = "none",
    batch: int = 64,
    prompt: int = 1024,
    spares: int | None = None,
    json_output: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Print what a launch would do, before anything starts: memory, link bytes, tokens/s.

    Beside expert parallelism the alternatives, and which of them is the right choice.

    Parameters
    ----------
    model
        As of launch; config.json is enough.
    topology
        A TOML file, or the name of one in topology/.
    gpus
        Number of ranks, the first of the topology.
    batch
        Sequences at once, over all ranks.
    prompt
        Tokens of each prompt.
    spares
        As of launch: 2 from four ranks up.
    json_output
        Print JSON.
    """
    from lightmoe.plan import Wish, make_plan, render

    made = make_plan(
        Wish(
            model=_model_config(model),
            model_name=Path(model).name,
            topology=_topology(topology, gpus),
            quantization=quantization,
            batch=batch,
            prompt=prompt,
            spares=(2 if gpus >= 4 else 0) if spares is None else spares,
        )
    )
    if json_output:
        print(json.dumps(made.to_json(), indent=2))
    else:
        render(made, Console())


@app.command
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

    machine = _topology(topology, gpus)
    lines, figures = answer(
        Question(
            topology=machine,
            model=None if model is None else _model_config(model),
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


topology_app = App(name="topology", help="Describe machines: ranks, links, bandwidths, memory.")
app.command(topology_app)


@topology_app.command
def probe(
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    gpus: int = 10,
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> None:
    """Measure this machine and write its description: about 20 s for four cards.

    Parameters
    ----------
    output
        The TOML file to write.
    gpus
        Number of ranks, where the device is the CPU. Cards are all measured.
    device
        auto takes the cards where there are any.
    """
    from lightmoe.plan.probing import probe_machine
    from lightmoe.topology import read_topology
    from lightmoe.topology.show import topology_tree

    console = Console(stderr=True)
    probe_machine(output, gpus, device, lambda line: console.print(line, highlight=False))
    Console().print(topology_tree(read_topology(output)), highlight=False)


@topology_app.command
def show(topology: str, /) -> None:
    """Print a description as a tree.

    Parameters
    ----------
    topology
        A TOML file, or the name of one in topology/.
    """
    from lightmoe.topology.show import topology_tree

    Console().print(topology_tree(_topology(topology)), highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit."""
    console = Console(stderr=True)
    try:
        result = app(
            arguments, exit_on_error=False, print_error=False, result_action="return_value"
        )
        sys.exit(result if isinstance(result, int) else 0)
    except CycloptsError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(UsageError.exit_code)
    except LightMoEError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(0)


def _topology(name: str, num_ranks: int | None = None) -> Topology:
    """The machine of that name or file, or its first ranks."""
    from lightmoe.topology import read_topology

    machine = read_topology(find_data_file("topology", name))
    return machine if num_ranks is None else machine.first(num_ranks)


def _model_config(name: str) -> ModelConfig:
    from lightmoe.models.config import read_config
    from lightmoe.models.find import find_model

    return read_config(find_model(name))


def _given(flags: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(flags).items() if value is not None}


def _print_stream(prompt: str, pieces: Any) -> None:
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _read_line() -> str | None:
    try:
        return input("> ").strip() or None
    except EOFError:
        return None


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """One bar per stage: ranks that have started, ranks that have loaded."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    labels = {"start": "starting ranks", "load": "loading weights"}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bars = Bars(*columns, console=console)
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            bars.start()
            tasks[stage] = bars.add_task(labels[stage], total=total)
        bars.update(tasks[stage], completed=done)
        if stage == "load" and done == total:
            bars.stop()

    try:
        yield report
    finally:
        bars.stop()


if __name__ == "__main__":
    main()
