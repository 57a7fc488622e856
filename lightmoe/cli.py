"""The command line. Exit codes: 0 a clean stop, 1 what fails at run time, 2 wrong usage."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from lightmoe import __version__
from lightmoe.balancer import commands as balancer_commands
from lightmoe.config import LaunchConfig, find_data_file
from lightmoe.errors import LightMoEError, UsageError
from lightmoe.flags import NO_FLAGS, Flags, given_flags
from lightmoe.progress import progress_bars
from lightmoe.telemetry import commands as telemetry_commands

app = App(
    name="lightmoe",
    help="Serve Mixture-of-Experts models, experts spread over any number of GPUs or processes.",
    version=__version__,
    suppress_keyboard_interrupt=False,
)
app.command(telemetry_commands.overlap)
app.command(balancer_commands.replay)
app.command(balancer_commands.simulate)


@app.command
def launch(recipe: str | None = None, /, *, flags: Flags = NO_FLAGS) -> None:
    """Start the ranks and serve, until Ctrl-C.

    Parameters
    ----------
    recipe
        A TOML file with these flags' names as keys, or the name of one in launch/.
    """
    console = Console(stderr=True)
    config = LaunchConfig.from_recipe(recipe, given_flags(flags))
    from lightmoe.launch import serve

    with progress_bars(console) as progress:
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
        progress_bars(Console(stderr=True)) as progress,
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
    flags: Flags = NO_FLAGS,
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
        lines = profiling.profile_with_nsys(recipe, given_flags(flags), workload, output, nsys_path)
    else:
        run = profiling.run_under_nsys if under_nsys else profiling.profile
        with progress_bars(Console(stderr=True)) as progress:
            lines = run(recipe, given_flags(flags), workload, output, progress)
    print(*lines, sep="\n")


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
    flags: Flags = NO_FLAGS,
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
        report = command.bench_server(url, recipe, given_flags(flags), run)
    else:
        with progress_bars(console) as progress:
            report = command.bench_here(recipe, given_flags(flags), run, progress)
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
    from lightmoe.models.config import read_config
    from lightmoe.models.find import find_model
    from lightmoe.plan import Wish, make_plan, render
    from lightmoe.topology import read_topology

    made = make_plan(
        Wish(
            model=read_config(find_model(model)),
            model_name=Path(model).name,
            topology=read_topology(find_data_file("topology", topology)).first(gpus),
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
    from lightmoe.topology import read_topology
    from lightmoe.topology.show import topology_tree

    machine = read_topology(find_data_file("topology", topology))
    Console().print(topology_tree(machine), highlight=False)


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


if __name__ == "__main__":
    main()
