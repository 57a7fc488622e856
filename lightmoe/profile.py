"""`lightmoe profile`: run a workload of known steps, and record a few of them on every rank.

Every rank gets as many prompts of the same length, so that all steps of a phase are alike. The
launch is the one that `lightmoe launch` would make with the same flags.
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lightmoe.config import LaunchConfig
from lightmoe.core import ModelInfo, Request, RequestOutput, SamplingParams
from lightmoe.engine.engine import Engine, SchedulerConfig
from lightmoe.engine.worker_group import WorkerGroup
from lightmoe.errors import UsageError
from lightmoe.launch import start_workers
from lightmoe.telemetry.nsys import read_report
from lightmoe.telemetry.nsys_run import find_nsys, run_nsys
from lightmoe.telemetry.rank_recorder import TraceConfig
from lightmoe.telemetry.records import Trace
from lightmoe.telemetry.trace import MAX_SPANS
from lightmoe.telemetry.trace_file import read_trace, write_trace
from lightmoe.telemetry.trace_folder import collect, prepare_folder, with_bytes_of, write_folder
from lightmoe.worker.ray_group import Progress

Phase = Literal["prefill", "decode"]
_WARM_STEPS = 3
_SPANS = "spans.json.gz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`batch` sequences on each rank, with prompts of `prompt_tokens`; `steps` are recorded.

    In the phase prefill every step runs `batch` new prompts to their ends; in decode it adds one
    token to each of the same sequences.
    """

    phase: Phase = "prefill"
    steps: int = 3
    batch: int = 4
    prompt_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "prompt_tokens"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} is {getattr(self, name)}; give at least 1")

    def __str__(self) -> str:
        return f"{self.phase} of {self.batch} sequences a rank, {self.prompt_tokens} tokens each"

    @property
    def num_output_tokens(self) -> int:
        """Of each sequence. The first comes from the step that ends the prompt."""
        return 1 if self.phase == "prefill" else _WARM_STEPS + self.steps

    @property
    def limits(self) -> dict[str, int]:
        """What a launch must be told so that the steps come out as said."""
        return {
            "max_num_seqs": self.batch,
            "max_num_batched_tokens": self.batch * self.prompt_tokens,
            "max_model_len": self.prompt_tokens + self.num_output_tokens,
        }

    def window(self, folder: Path, *, device_records: bool) -> TraceConfig:
        """The steps to record."""
        return TraceConfig(
            folder=folder,
            first_step=_WARM_STEPS,
            num_steps=self.steps,
            device_records=device_records,
        )

    def requests(self, num_ranks: int, vocab_size: int) -> Iterator[Request]:
        """All prompts, no two of them alike."""
        rounds = _WARM_STEPS + self.steps if self.phase == "prefill" else 1
        params = SamplingParams(temperature=0.0, max_tokens=self.num_output_tokens, ignore_eos=True)
        for one in range(rounds * num_ranks * self.batch):
            tokens = tuple(
                (7919 * one + 31 * place + one * place) % vocab_size
                for place in range(self.prompt_tokens)
            )
            yield Request(request_id=str(one), prompt_token_ids=tokens, params=params)


def profile(
    recipe: str | None,
    options: Mapping[str, object],
    workload: Workload,
    folder: Path,
    progress: Progress,
) -> list[str]:
    """Run the workload and write the folder; how it ran and what was written, a line each."""
    config = _config(recipe, options, workload)
    folder = prepare_folder(folder)
    trace, how = _run(config, workload, folder, progress, device_records=True)
    return [how, *_write(trace, folder, workload)]


def profile_with_nsys(
    recipe: str | None,
    options: Mapping[str, object],
    workload: Workload,
    folder: Path,
    nsys_path: str | None,
) -> list[str]:
    """The same in a child under nsys. Kernels are its report's, which stays in the folder."""
    nsys = find_nsys(nsys_path)
    _config(recipe, options, workload)  # its errors here, not a child's
    folder = prepare_folder(folder)
    report = run_nsys(nsys, _child(recipe, options, workload, folder), folder)
    spans = folder / _SPANS
    trace = with_bytes_of(read_report(report), read_trace(spans))
    spans.unlink()
    return [*_write(trace, folder, workload), str(report.with_suffix(".nsys-rep"))]


def run_under_nsys(
    recipe: str | None,
    options: Mapping[str, object],
    workload: Workload,
    folder: Path,
    progress: Progress,
) -> list[str]:
    """The child: run the workload, and leave the spans for its parent."""
    config = _config(recipe, options, workload)
    trace, how = _run(config, workload, folder.resolve(), progress, device_records=False)
    write_trace(trace, folder / _SPANS)
    return [how, f"{workload}: ran under nsys"]


def run_workload(workers: WorkerGroup, model: ModelInfo, workload: Workload) -> None:
    """Run every request of a workload to its end; raises the error that ends one early.

    All are queued before the first step, so that no step is a part of one.
    """
    requests = list(workload.requests(len(workers.ranks), model.vocab_size))
    limits = SchedulerConfig(
        max_num_seqs=workload.limits["max_num_seqs"],
        max_num_batched_tokens=workload.limits["max_num_batched_tokens"],
        max_num_queued_reqs=len(requests),
    )
    outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    with closing(Engine(model, workers, limits)) as engine:
        for request in requests:
            engine.submit(request, outputs.put)
        engine.start()
        waiting = len(requests)
        while waiting:
            output = outputs.get()
            if output.error is not None:
                raise output.error
            waiting -= output.finish_reason is not None


def _config(recipe: str | None, options: Mapping[str, object], workload: Workload) -> LaunchConfig:
    given = [name for name in (*workload.limits, "trace") if name in options]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(
            f"{flags}: a profile sets this itself; give --batch, --prompt-tokens and -o"
        )
    return LaunchConfig.from_recipe(recipe, {**options, **workload.limits})


def _run(
    config: LaunchConfig,
    workload: Workload,
    folder: Path,
    progress: Progress,
    *,
    device_records: bool,
) -> tuple[Trace, str]:
    """The trace, and what the launch chose."""
    window = workload.window(folder, device_records=device_records)
    started = start_workers(config, progress, window)
    with closing(started.group) as group:
        device = group.ranks[0].device
        run_workload(group, started.model, workload)
    kind = "CPU" if device == "cpu" else "GPU"
    title = f"{started.model.name}, {config.gpus} {kind} ranks, {workload}"
    return collect(folder, config.gpus, title), started.summary


def _write(trace: Trace, folder: Path, workload: Workload) -> list[str]:
    lines = write_folder(trace, folder)
    num_steps = len({step for _, step in trace.steps})
    if num_steps < workload.steps:
        lines.append(
            f"{num_steps} of {workload.steps} steps recorded: a rank keeps {MAX_SPANS} spans"
        )
    return lines


def _child(
    recipe: str | None, options: Mapping[str, object], workload: Workload, folder: Path
) -> list[str]:
    """The command of run_under_nsys."""
    flags = {**options, **asdict(workload), "output": folder}
    return [
        sys.executable,
        *("-m", "lightmoe", "profile", "--under-nsys"),
        *([] if recipe is None else [recipe]),
        *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()),
    ]
