"""The command line. Exit codes: 0 a clean stop, 1 what fails at run time, 2 wrong usage."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, field, fields, make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from lightmoe import __version__
from lightmoe.config import LaunchConfig
from lightmoe.errors import LightMoEError, UsageError

if TYPE_CHECKING:
    from lightmoe.worker.ray_group import Progress

_HELP = {
    "model": "A model folder, or a name in ./models, the installed models or $LIGHTMOE_MODELS.",
    "gpus": "Number of ranks: GPUs, or processes where the device is the CPU.",
    "device": "auto takes the GPU for one rank where there is one, else the CPU, and says why.",
    "dtype": "auto is float32 on a CPU, float16 on Turing, bfloat16 from Ampere on.",
    "spares": "Ranks that hold replicas only. Default: 2 from four ranks up.",
    "placement": "spare: homes and spares; spread: all ranks alike.",
    "transport": "How rows travel between ranks.",
    "route": "How tokens are split over the replicas of an expert.",
    "load_format": "dummy makes weights up: config.json is enough, prompts are token ids.",
    "deterministic": "on: the same tokens whatever runs beside a request; off: faster on a GPU.",
    "max_model_len": "Tokens of prompt and answer together. Default: what the model says.",
    "max_num_seqs": "Sequences that run at once on a rank.",
    "max_num_batched_tokens": "Tokens that a rank runs in one step.",
    "memory_limit": 'Weights and KV cache of a rank, such as "11GiB".',
    "served_model_name": "The model's name in the API.",
    "seed": "Seed of dummy weights.",
    "host": "Address to listen on.",
    "port": "Port to listen on; 0 takes a free one.",
    "api_key": "Ask clients for this key.",
    "address": "A running Ray cluster. Default: a local one that ends with the launch.",
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
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("load.png"),
    url: str = "http://127.0.0.1:8000",
    api_key: str | None = None,
) -> None:
    """Draw the expert load of a running server.

    Parameters
    ----------
    output
        The file to write: .png, .npz or .json.
    """
    from lightmoe.client import Client
    from lightmoe.telemetry.heatmap import load_table_from_json, save

    with Client(url, api_key=api_key) as client:
        save(load_table_from_json(client.expert_load()), output)
    print(output)


@app.command
def doctor(*, port: int = 8000, gpus: int = 10) -> int:
    """Look at this machine and say what is missing, with remedies."""
    from lightmoe.doctor import diagnose, exit_code, render

    findings = diagnose(port, gpus)
    render(findings)
    return exit_code(findings)


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
