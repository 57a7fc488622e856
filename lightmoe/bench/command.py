"""`lightmoe bench`: sweep one server, or ranks started here once for each routing."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightmoe.bench.measure import measure
from lightmoe.bench.report import Report, new_folder, waited
from lightmoe.bench.sweep import NATURAL, Prompts, Sweep
from lightmoe.bench.targets import EngineTarget, ServerTarget, Target
from lightmoe.collector import settle_objects
from lightmoe.config import LaunchConfig, load_recipe, parse_skew
from lightmoe.errors import UsageError

if TYPE_CHECKING:
    from lightmoe.launch import Launched
    from lightmoe.worker.ray_group import Progress

DEFAULT_ROUTINGS = "uniform,zipf:1.0"

JSON_NAME, PNG_NAME = "bench.json", "bench.png"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What to measure, where to write it, and whom to tell how far it is.

    Prompts are cut from `text` where there is one.
    """

    sweep: Sweep
    folder: Path
    text: Path | None = None
    say: Say = print


def bench_server(url: str, recipe: str | None, flags: Mapping[str, object], run: Run) -> Report:
    """Sweep a running server, its routing as it was launched."""
    useless = ["a recipe"] * (recipe is not None) + ["--text"] * (run.text is not None)
    useless += [f"--{name.replace('_', '-')}" for name in flags if name != "api_key"]
    if useless:
        raise UsageError(f"{useless[0]} has no meaning with --url {url}; leave one of the two out")
    key = flags.get("api_key")
    new_folder(run.folder)
    with ServerTarget(url, None if key is None else str(key)) as target:
        report = _new_report(run)
        _sweep(target, (), report, run)
    return report


def bench_here(
    recipe: str | None, flags: Mapping[str, object], run: Run, progress: Progress
) -> Report:
    """Start ranks and sweep them, once for each of the names in the flag routing_skew, such as
    "natural,zipf:1.0"; the other flags are those of a launch.
    """
    values = ({} if recipe is None else load_recipe(recipe)) | dict(flags)
    routings = parse_routings(str(values.pop("routing_skew", DEFAULT_ROUTINGS)))
    configs = [launch_config(values, routing, run.sweep) for routing in routings]
    words = None if run.text is None else _read(run.text)
    new_folder(run.folder)
    report = _new_report(run)
    launches = report.config["launches"] = []
    for routing, config in zip(routings, configs, strict=True):
        with _launched(config, progress) as launched:
            run.say(launched.summary)
            launches.append(shown(config, launched.summary))
            tokens = () if words is None else _encode(launched, words)
            target = EngineTarget(launched.engine, launched.summary, routing)
            _sweep(target, tokens, report, run)
    return report


def save(report: Report, folder: Path) -> list[Path | str]:
    """Draw the charts next to the JSON; what was written, or why there is no chart."""
    written: list[Path | str] = [folder / JSON_NAME]
    if importlib.util.find_spec("matplotlib") is None:
        return [*written, "no charts without matplotlib: pip install 'lightmoe[plot]'"]
    from lightmoe.bench.figure import draw

    draw(report).savefig(folder / PNG_NAME, format="png")
    return [*written, folder / PNG_NAME]


def _new_report(run: Run) -> Report:
    text = None if run.text is None else run.text.name
    return Report(command=command_line(), config={"sweep": asdict(run.sweep), "text": text})


def command_line() -> str:
    """What was typed, without the key."""
    line = " ".join(["lightmoe", *sys.argv[1:]])
    return re.sub(r"--api-key[ =]\S+", "--api-key ...", line)


def parse_routings(text: str) -> list[str]:
    """Reads "natural,uniform,zipf:1.0"; raises UsageError."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name != NATURAL:
            parse_skew(name)
    return names


def launch_config(values: Mapping[str, object], routing: str, sweep: Sweep) -> LaunchConfig:
    """A launch that can run the largest batch at once; UsageError where the flags do not let it."""
    skew = None if routing == NATURAL else routing
    config = LaunchConfig.from_recipe(None, {**values, "routing_skew": skew})
    largest = max(sweep.batch_sizes)
    per_rank = -(-largest // config.gpus)
    if "max_num_seqs" not in values:
        budget = config.max_num_batched_tokens
        if "max_num_batched_tokens" not in values:
            budget = max(budget, per_rank)
        return replace(
            config,
            max_num_seqs=max(config.max_num_seqs, per_rank),
            max_num_batched_tokens=budget,
        )
    if config.max_num_seqs < per_rank:
        raise UsageError(
            f"a batch of {largest} does not run at once on {config.gpus} ranks with max_num_seqs"
            f" {config.max_num_seqs}; give --max-num-seqs {per_rank} or leave it out"
        )
    return config


def _sweep(target: Target, text: Sequence[int], report: Report, run: Run) -> None:
    """All cells, written after each: what was measured stays if a later cell fails."""
    facts = target.facts
    check_fits(target, run.sweep)
    report.model = facts.model
    prompts = Prompts(facts.vocab_size, run.sweep.seed, text)
    for batch_size, prompt_length in run.sweep.cells():
        run.say(f"{facts.routing}: batch {batch_size}, prompts of {prompt_length} tokens")
        row = measure(target, prompts, batch_size, prompt_length, run.sweep)
        report.rows.append(row)
        report.write(run.folder / JSON_NAME)
        for line in waited([row]):
            run.say(line)


def check_fits(target: Target, sweep: Sweep) -> None:
    """UsageError where a cell cannot run: said before any does."""
    facts, longest = target.facts, max(sweep.prompt_lengths)
    if longest + sweep.output_length > facts.max_model_len:
        raise UsageError(
            f"prompts of {longest} tokens and {sweep.output_length} more are over the"
            f" {facts.max_model_len} tokens that {facts.model} takes; give a shorter"
            " --prompt-lengths or --output-length"
        )
    largest = max(sweep.batch_sizes)
    if facts.max_batch_size is not None and largest > facts.max_batch_size:
        raise UsageError(
            f"a batch of {largest} is over the {facts.max_batch_size} requests that the queue"
            " holds; give smaller --batch-sizes"
        )


@contextlib.contextmanager
def _launched(config: LaunchConfig, progress: Progress) -> Iterator[Launched]:
    from lightmoe.launch import start_engine  # Ray and more, which a running server does not need

    launched = start_engine(config, progress)
    settle_objects()
    try:
        yield launched
    finally:
        launched.engine.close()


def shown(config: LaunchConfig, summary: str) -> dict[str, Any]:
    """The launch without its secret, and without what only a server uses."""
    hidden = {"api_key", "host", "port"}
    kept = {name: value for name, value in asdict(config).items() if name not in hidden}
    return {**kept, "summary": summary}


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{text} cannot be read as text: {error}") from None


def _encode(launched: Launched, words: str) -> list[int]:
    if launched.tokenizer is None:
        raise UsageError("this model has no tokenizer; leave --text out")
    return launched.tokenizer.encode(words, add_special_tokens=False)
