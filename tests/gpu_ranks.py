"""Ranks as processes that share one GPU, for tests of what runs between GPUs.

NCCL takes several ranks of one GPU where each has a host name of its own; they then talk over
loopback sockets, with NCCL's real kernels.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from lightmoe.distributed.communicator import Communicator, Rendezvous
from lightmoe.distributed.nccl import NcclCommunicator, nccl_environment

_TRACEBACK_SECONDS = 35.0


@dataclass(frozen=True)
class Rank:
    """What a task gets: this rank's ends of both groups."""

    rank: int
    num_ranks: int
    device: torch.device
    control: Communicator
    nccl: NcclCommunicator


def run_ranks(
    num_ranks: int, task: str, timeout_seconds: float = 60.0, patience_seconds: float = 120.0
) -> list[Any]:
    """What `task`, "module:function", returned on every rank: JSON, {"died": ...} or {"error"}."""
    rendezvous = Rendezvous(timeout_seconds)
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
    processes = [
        context.Process(
            target=_run,
            args=(rank, num_ranks, rendezvous.port, timeout_seconds, task, pipe[1]),
        )
        for rank, pipe in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    deadline = time.monotonic() + patience_seconds
    answers = [_answer(receiver, deadline) for receiver, _ in pipes]
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
        process.close()
    return answers


def _answer(receiver: Connection, deadline: float) -> Any:
    if not receiver.poll(max(0.0, deadline - time.monotonic())):
        return {"hangs": True}
    try:
        return json.loads(receiver.recv_bytes())
    except EOFError:
        return {"died": True}


def _run(
    rank: int, num_ranks: int, port: int, timeout_seconds: float, task: str, sender: Connection
) -> None:
    faulthandler.dump_traceback_later(_TRACEBACK_SECONDS)  # where it hangs, if it does
    try:
        answer = _answer_of(rank, num_ranks, port, timeout_seconds, task)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
    sender.send_bytes(json.dumps(answer).encode())
    sender.close()
    os._exit(0)  # what hangs on the GPU must not hold the process


def _answer_of(rank: int, num_ranks: int, port: int, timeout_seconds: float, task: str) -> Any:
    os.environ.update(nccl_environment(rank, oversubscribed=True))
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    control = Communicator(rank, num_ranks, port, timeout_seconds)
    nccl = NcclCommunicator(rank, num_ranks, control, device, timeout_seconds)
    module, _, function = task.partition(":")
    with torch.inference_mode():
        return getattr(importlib.import_module(module), function)(
            Rank(rank, num_ranks, device, control, nccl)
        )
