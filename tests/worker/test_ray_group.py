"""Real Ray: the ranks compute what threads compute, and no death among them goes unnoticed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from lightmoe.config import MAX_RANKS
from lightmoe.core import Batch, SamplingStep, SequenceStep, StepResult
from lightmoe.engine.worker_group import WorkerGroup
from lightmoe.errors import CheckpointError, MachineError, RankError
from lightmoe.worker.local_group import LocalWorkerGroup
from lightmoe.worker.ray_cluster import RayConfig
from lightmoe.worker.ray_group import RayWorkerGroup
from tests.models.folders import write_model
from tests.sockets import listening_addresses
from tests.worker.groups import new_config

DEAD_WITHIN_SECONDS = 10.0
GREEDY = SamplingStep(
    temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, position=0, num_logprobs=3
)


def no_progress(stage: str, num_done: int, num_ranks: int) -> None:
    """Nobody watches."""


def new_group(folder: Path, num_ranks: int, **options: object) -> RayWorkerGroup:
    return RayWorkerGroup(new_config(folder, num_ranks, **options), RayConfig(), no_progress)


def batches(num_ranks: int) -> list[Batch]:
    """A prompt on rank 0, nothing on the next, a longer prompt on the last."""
    parts: list[tuple[SequenceStep, ...]] = [()] * num_ranks
    parts[0] = (SequenceStep(0, (3, 1, 4, 1, 5), 0, (0,), GREEDY),)
    if num_ranks > 1:
        parts[-1] = (SequenceStep(1, tuple(range(20)), 0, (1, 2), GREEDY),)
    sizes = tuple(sum(len(one.token_ids) for one in part) for part in parts)
    return [Batch(0, sizes, part) for part in parts]


def assert_gone(pids: list[int], seconds: float) -> None:
    """All have ended; a zombie that nobody has waited for has ended too."""
    deadline = time.monotonic() + seconds
    left = set(pids)
    while left:
        for pid in list(left):
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    continue
            left.discard(pid)
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def group(folder: Path) -> Iterator[RayWorkerGroup]:
    """Three ranks, one of them a spare, that live as long as this module: so does Ray."""
    group = new_group(folder, 3, num_spares=1)
    yield group
    group.close()


@pytest.fixture
def other(folder: Path, group: RayWorkerGroup) -> Iterator[Callable[..., RayWorkerGroup]]:
    """Starts further groups in the same Ray, for tests that break them."""
    groups = []

    def start(num_ranks: int, **options: object) -> RayWorkerGroup:
        groups.append(new_group(folder, num_ranks, **options))
        return groups[-1]

    yield start
    for one in groups:
        one.close()


def one_step(group: WorkerGroup) -> list[StepResult]:
    group.begin(batches(3))
    return group.finish()


def plain(results: list[StepResult]) -> list[tuple[object, ...]]:
    return [
        (one.rank, one.step, one.tokens, one.expert_tokens.tolist(), one.layer_pairs.tolist())
        for one in results
    ]


def test_processes_compute_what_threads_compute(group: RayWorkerGroup, folder: Path) -> None:
    threads = LocalWorkerGroup(new_config(folder, 3, num_spares=1))

    assert plain(one_step(group)) == plain(one_step(threads))

    threads.close()
    assert [rank.kind for rank in group.ranks] == ["home", "home", "spare"]
    assert group.block_size == 16
    group.check()


def test_every_rank_is_a_process_of_its_own(group: RayWorkerGroup) -> None:
    pids = [rank.pid for rank in group.ranks]

    assert len({*pids, os.getpid()}) == 4
    for pid in pids:
        assert "RankActor" in " ".join(psutil.Process(pid).cmdline())


def test_ranks_open_no_port_to_the_network_beside_rays_own(group: RayWorkerGroup) -> None:
    """What Ray itself opens is known from an actor that has nothing to do with us."""

    class Bare:
        def pid(self) -> int:
            return os.getpid()

    def num_open(pid: int) -> int:
        return sum(not address.startswith("127.") for address, _ in listening_addresses(pid))

    bare = ray.remote(Bare).options(num_cpus=0).remote()
    rays_own = num_open(ray.get(bare.pid.remote()))
    ray.kill(bare)

    for rank in group.ranks:
        addresses = listening_addresses(rank.pid)
        assert any(address == "127.0.0.1" for address, _ in addresses)  # gloo
        assert num_open(rank.pid) <= rays_own


def test_close_ends_every_rank_and_leaves_the_others(
    group: RayWorkerGroup, other: Callable[..., RayWorkerGroup]
) -> None:
    doomed = other(2)
    pids = [rank.pid for rank in doomed.ranks]

    doomed.close()
    doomed.close()

    assert_gone(pids, seconds=5)
    assert len(one_step(group)) == 3


def test_a_rank_killed_while_idle_is_named(other: Callable[..., RayWorkerGroup]) -> None:
    doomed = other(2)
    doomed.check()

    os.kill(doomed.ranks[1].pid, signal.SIGKILL)

    def watch() -> None:
        deadline = time.monotonic() + DEAD_WITHIN_SECONDS
        while time.monotonic() < deadline:
            doomed.check()
            time.sleep(0.05)

    with pytest.raises(RankError, match="rank 1 died"):
        watch()


def test_a_rank_killed_during_a_step_is_named(other: Callable[..., RayWorkerGroup]) -> None:
    doomed = other(3)
    one_step(doomed)
    victim = doomed.ranks[1].pid
    # It takes part in no exchange any more, so the step is still going on when it dies.
    os.kill(victim, signal.SIGSTOP)
    killer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
    killer.start()
    started = time.monotonic()

    with pytest.raises(RankError, match="rank 1 died"):
        one_step(doomed)

    assert 0.5 <= time.monotonic() - started < DEAD_WITHIN_SECONDS
    killer.join()


def test_a_rank_that_hangs_is_named(other: Callable[..., RayWorkerGroup]) -> None:
    doomed = other(3, timeout_seconds=1.0)
    victim = doomed.ranks[2].pid
    os.kill(victim, signal.SIGSTOP)

    try:
        with pytest.raises(RankError, match=r"ranks \[2\] did not answer"):
            one_step(doomed)
    finally:
        os.kill(victim, signal.SIGKILL)


def test_an_error_of_a_rank_at_its_start_comes_out_as_it_was_raised(
    group: RayWorkerGroup, tmp_path: Path
) -> None:
    folder = write_model(tmp_path)
    config = new_config(folder, 2)
    (folder / "model.safetensors").write_bytes(b"gone")

    with pytest.raises(CheckpointError, match=r"model\.safetensors has 4 bytes"):
        RayWorkerGroup(config, RayConfig(), no_progress)

    deadline = time.monotonic() + 10
    while ray.available_resources()["lightmoe_rank"] != MAX_RANKS - len(group.ranks):
        assert time.monotonic() < deadline, "the ranks that were started hold their room"
        time.sleep(0.05)


def test_progress_tells_every_rank_that_has_started_and_loaded(
    group: RayWorkerGroup, folder: Path
) -> None:
    seen: list[tuple[str, int, int]] = []

    RayWorkerGroup(
        new_config(folder, 2), RayConfig(), lambda *progress: seen.append(progress)
    ).close()

    assert seen == [(stage, done, 2) for stage in ("start", "load") for done in range(3)]


def test_another_ray_than_the_one_in_use_is_refused(group: RayWorkerGroup, folder: Path) -> None:
    with pytest.raises(MachineError, match=r"another Ray than 127\.0\.0\.1:1 already"):
        RayWorkerGroup(new_config(folder, 1), RayConfig(address="127.0.0.1:1"), no_progress)


DRIVER = """
import sys
from pathlib import Path
from tests.worker.test_ray_group import new_group
group = new_group(Path(sys.argv[1]), 2)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_driver_takes_everything_with_it_and_leaves_its_token_private(
    folder: Path, tmp_path: Path, checkout: Path
) -> None:
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": path}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        cwd=checkout,
        umask=0o022,
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"ready\n"
        everything = [one.pid for one in psutil.Process(driver.pid).children(recursive=True)]
        names = " ".join(" ".join(psutil.Process(pid).cmdline()) for pid in everything)
        assert names.count("RankActor") == 2
        assert "raylet" in names
    finally:
        driver.kill()
        driver.communicate()

    assert_gone(everything, DEAD_WITHIN_SECONDS)
    token = tmp_path / ".ray" / "auth_token"
    assert token.read_text().strip()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_counts_are_plain_integers(group: RayWorkerGroup) -> None:
    group.begin(batches(3))
    for result in group.finish():
        assert result.expert_tokens.dtype == np.int32
        assert result.expert_tokens.shape == (2, 5)
        assert result.layer_pairs.shape == (2,)
