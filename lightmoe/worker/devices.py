"""Which device the ranks get, which card each of them, and how much of its memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lightmoe.config import LaunchConfig
from lightmoe.errors import LightMoEError, MachineError, UsageError
from lightmoe.machine import Driver, read_cupy

_SHARING_RANK_BYTES = 1 << 30
"""Of each rank where several share a card: CUDA's context, NCCL's buffers, a step's moments."""


@dataclass(frozen=True, slots=True)
class Devices:
    """`device` is "cpu" or "cuda"; on GPUs `cards` is the one of each rank."""

    device: str
    reason: str
    cards: tuple[int, ...] = ()


def choose_devices(config: LaunchConfig, driver: Driver) -> Devices:
    """GPUs where there are enough, else the CPU; an error where the user insists on GPUs."""
    if config.device == "cpu":
        return Devices("cpu", "the CPU was asked for")
    try:
        return _gpus(config, driver)
    except LightMoEError as error:
        if config.device == "cuda" or config.oversubscribe:
            raise
        return Devices("cpu", str(error).partition(";")[0])


def card_of_rank(rank: int, num_ranks: int, num_cards: int) -> int:
    """Ranks in order over the cards, as many on each as the numbers allow."""
    return rank if num_ranks <= num_cards else rank * num_cards // num_ranks


def gpu_bytes_per_rank(config: LaunchConfig, cards: tuple[int, ...], driver: Driver) -> int:
    """What a rank may use of its card: the least that any rank has, for all are sized alike."""
    shares = []
    for card, num_ranks in Counter(cards).items():
        usable = int(driver.gpus[card].free_bytes * config.gpu_memory_utilization)
        share = usable // num_ranks - (_SHARING_RANK_BYTES if num_ranks > 1 else 0)
        if share <= 0:
            raise MachineError(
                f"GPU {card} has {usable / 2**30:.1f} GiB for {num_ranks} ranks, which need"
                f" {num_ranks * _SHARING_RANK_BYTES / 2**30:.0f} GiB before any weight;"
                " use fewer ranks (--gpus)"
            )
        shares.append(share)
    return min(shares)


def _gpus(config: LaunchConfig, driver: Driver) -> Devices:
    """The cards of all ranks; what comes before the semicolon of an error is a reason, too."""
    missing = _why_no_cuda(driver)
    if missing is not None:
        raise MachineError(f"{missing}; see `lightmoe doctor`, or use --device cpu")
    num_cards = len(driver.gpus)
    if num_cards < config.gpus and not config.oversubscribe:
        raise UsageError(
            f"{num_cards} GPU(s) found for {config.gpus} ranks; use --gpus {num_cards}, or"
            " --oversubscribe for several ranks on each GPU"
        )
    if config.gpus > 1 and not read_cupy():
        raise MachineError(
            f"{num_cards} GPU(s) found, but no cupy for the exchange between them; install"
            f" lightmoe[{'cuda13' if driver.major >= 580 else 'cuda12'}], or use --device cpu"
        )
    cards = tuple(card_of_rank(rank, config.gpus, num_cards) for rank in range(config.gpus))
    each = "one rank" if config.gpus == 1 else f"{config.gpus} ranks"
    where = driver.gpus[0].name
    if len(set(cards)) > 1:
        where = f"{len(set(cards))} GPUs, the first {where}"
    return Devices("cuda", f"{each} on {where}", cards)


def _why_no_cuda(driver: Driver) -> str | None:
    """Why CUDA cannot be used here, None if it can. torch is asked only where there is a card."""
    if driver.error is not None:
        return f"the NVIDIA driver does not answer ({driver.error})"
    if not driver.gpus:
        return "no GPU found"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} cannot use the GPU under driver {driver.version}"
    return None
