"""Ends that come early: a signal while Ray starts, one port for two launches, an exit unclosed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from lightmoe import cli, launch
from lightmoe.errors import MachineError
from tests.test_end_to_end import READY, Server, begin_long_answer, launched, wait_until_gone


def test_a_port_is_held_before_anything_is_served() -> None:
    with launch.listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(MachineError, match=f"port {port} of 127.0.0.1 cannot be used"):
            launch.listen("127.0.0.1", port)


def test_an_interrupted_command_ends_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "serve", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main(["launch", "--model", "mixtral-lite", "--gpus", "2"])
    assert ended.value.code == 0


def _children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def _descendants(parent: int) -> list[int]:
    return [pid for child in _children(parent) for pid in (child, *_descendants(child))]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_ray_starts_leaves_nothing_behind(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "lightmoe", "launch", "--gpus", "2", "--port", "0"]
    with subprocess.Popen(
        [*command, "--model", "mixtral-lite"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 30
        while not _descendants(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        seen: set[int] = set(_descendants(process.pid))
        assert seen, "Ray started no process"
        os.kill(process.pid, number)
        while process.poll() is None and time.monotonic() < deadline:
            seen |= set(_descendants(process.pid))
            time.sleep(0.02)
        assert process.returncode == 0
    assert [pid for pid in seen if _lives(pid)] == []


def _signal_group(server: Server) -> None:
    """As a shell's kill -- -PGID does."""
    os.killpg(server.process.pid, signal.SIGTERM)


def _signal_all(server: Server) -> None:
    """As systemd does: ranks, too, are processes of the service."""
    for process in [*server.descendants(), server.process]:
        process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(("send", "is_busy"), [(_signal_group, False), (_signal_all, True)])
def test_a_signal_that_ray_gets_too_stops_everything_in_silence(
    send: Callable[[Server], None], is_busy: bool
) -> None:
    """Ray's control store dies of it first, and whoever waits for that waits for long."""
    with launched("--gpus", "2", own_group=True) as server:
        everything = server.descendants()
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            if is_busy:
                _answer = begin_long_answer(client)
            send(server)
            assert server.process.wait(timeout=5) == 0
        assert wait_until_gone(everything, 2) == []
        server.finish()
        ready = next(place for place, line in enumerate(server.lines) if READY.search(line))
        assert "".join(server.lines[ready + 1 :]).strip() == ""


def test_an_llm_that_is_not_closed_ends_in_silence() -> None:
    script = "from lightmoe import LLM; LLM('mixtral-lite', gpus=2).generate('x')"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_step_that_hangs_does_not_keep_the_server_from_stopping() -> None:
    """One rank is stopped, so the step never ends; the client still gets an answer."""
    with launched("--gpus", "2") as server:
        ranks = [
            process
            for process in server.descendants()
            if "RankActor" in " ".join(process.cmdline())
        ]
        with (
            openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            ranks[0].suspend()
            answer = pool.submit(
                client.completions.create, model="mixtral-lite", prompt="def f():", max_tokens=4
            )
            time.sleep(1)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(timeout=5) == 0
            with pytest.raises(openai.InternalServerError) as refused:
                answer.result()
        assert refused.value.status_code == 503
        assert "shut" in str(refused.value)
