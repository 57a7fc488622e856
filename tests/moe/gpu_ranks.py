"""Ranks as processes on the cards of this machine, several on one where there are fewer cards."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.queues import Queue
from typing import Any

import torch

from lightmoe.distributed.communicator import Communicator, Rendezvous

_TIMEOUT_SECONDS = 200.0


def run_on_ranks(num_ranks: int, body: Callable[..., Any], *arguments: object) -> list[Any]:
    """body(communicator, device, *arguments) on every rank; what each returned, in rank order.

    `body` is a function of a module. The first failure is raised with the rank's own traceback.
    """
    context = get_context("spawn")
    rendezvous = Rendezvous(60)
    answers: Queue[tuple[int, Any, str | None]] = context.Queue()
    processes = [
        context.Process(
            target=_rank, args=(rank, num_ranks, rendezvous.port, answers, body, arguments)
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        results: dict[int, Any] = {}
        while len(results) < num_ranks:
            rank, result, failure = answers.get(timeout=_TIMEOUT_SECONDS)
            assert failure is None, f"rank {rank}:\n{failure}"
            results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    return [results[rank] for rank in range(num_ranks)]


def _rank(
    rank: int,
    num_ranks: int,
    port: int,
    answers: Queue[tuple[int, Any, str | None]],
    body: Callable[..., Any],
    arguments: tuple[object, ...],
) -> None:
    device = torch.device("cuda", rank * torch.cuda.device_count() // num_ranks)
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.inference_mode():
            result = body(Communicator(rank, num_ranks, port, 60), device, *arguments)
        answers.put((rank, result, None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
