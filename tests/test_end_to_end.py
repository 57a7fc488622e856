"""The command line as a user has it: launch, talk to it with the official client, stop it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
import psutil
import pytest

from lightmoe import Client

LIGHTMOE = [sys.executable, "-m", "lightmoe"]
READY = re.compile(r"is ready on (http://\S+)")


class Server:
    """A `lightmoe launch` in a process of its own."""

    def __init__(
        self, *arguments: str, model: str = "mixtral-lite", own_group: bool = False
    ) -> None:
        command = [*LIGHTMOE, "launch", "--model", model, "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=own_group
        )
        self.lines: list[str] = []
        self._ready = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._ready.wait(120), "".join(self.lines)
        assert self.url, "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := READY.search(line):
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def finish(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def launched(
    *arguments: str, model: str = "mixtral-lite", own_group: bool = False
) -> Iterator[Server]:
    server = Server(*arguments, model=model, own_group=own_group)
    try:
        yield server
    finally:
        server.finish()


def wait_until_gone(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that are still there (a zombie nobody has waited for is gone)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        left = [process for process in processes if _runs(process)]
        if not left:
            return []
        time.sleep(0.1)
    return left


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with launched("--gpus", "4") as running:
        yield running


def test_it_says_what_was_chosen_and_why(server: Server) -> None:
    said = "".join(server.lines)
    assert "float32" in said
    assert "transport gloo" in said
    assert "2 homes + 2 spares" in said


def test_the_official_client_streamed_and_not(server: Server) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        (model,) = client.models.list().data
        whole = client.completions.create(
            model=model.id, prompt="def fibonacci(n):", max_tokens=24, temperature=0
        )
        pieces = client.completions.create(
            model=model.id, prompt="def fibonacci(n):", max_tokens=24, temperature=0, stream=True
        )
        text = "".join(piece.choices[0].text for piece in pieces)
        assert whole.choices[0].text == text
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 24
        answer = client.chat.completions.create(
            model=model.id, messages=[{"role": "user", "content": "import os"}], max_tokens=8
        )
        assert answer.choices[0].message.content is not None


def test_the_load_adds_up(server: Server, tmp_path: Path) -> None:
    with Client(server.url) as client:
        completion = client.complete("class Stack:", max_tokens=16, temperature=0)
        load = client.expert_load()
        stream = "".join(client.stream("class Stack:", max_tokens=16, temperature=0))
    assert stream == completion.text
    pairs = sum(map(sum, load["expert_tokens"]))
    assert pairs == sum(map(sum, load["rank_pairs"])) > 0
    assert load["rank_kinds"] == ["home", "home", "spare", "spare"]
    assert sum(load["rank_pairs"][2]) > 0, "a spare computes pairs from the first request on"
    picture = tmp_path / "load.png"
    command = [*LIGHTMOE, "heatmap", "--url", server.url, "-o", str(picture)]
    assert subprocess.run(command, check=False).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_many_at_once_answer_as_one_alone(server: Server) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        prompts = ["def add(a, b):", "import sys\n", "class A:", "for i in range("] * 3
        together = client.completions.create(
            model="mixtral-lite", prompt=prompts, max_tokens=12, temperature=0.7, seed=5
        )
        alone = client.completions.create(
            model="mixtral-lite", prompt=prompts[0], max_tokens=12, temperature=0.7, seed=5
        )
    assert together.choices[0].text == alone.choices[0].text


def test_generate_and_chat_against_the_server(server: Server) -> None:
    generate = subprocess.run(
        [*LIGHTMOE, "generate", "def add(a, b):", "--url", server.url, "--max-tokens", "8"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert generate.stdout.startswith("def add(a, b):")
    chat = subprocess.run(
        [*LIGHTMOE, "chat", "--url", server.url, "--max-tokens", "8"],
        input="import os\n\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert chat.stdout.startswith("> ")


def begin_long_answer(client: openai.OpenAI) -> openai.Stream:
    """A stream of 2,000 tokens whose first has come; keep it, or its request ends."""
    stream = client.completions.create(
        model="mixtral-lite",
        prompt="def f():",
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    return stream


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_within_five_seconds(number: signal.Signals) -> None:
    with launched("--gpus", "3") as server:
        everything = server.descendants()
        assert sum("RankActor" in " ".join(process.cmdline()) for process in everything) == 3
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            _answer = begin_long_answer(client)
            server.process.send_signal(number)
            assert server.process.wait(timeout=5) == 0
        assert wait_until_gone(everything, 2) == []


def test_a_killed_driver_leaves_nothing_behind() -> None:
    with launched("--gpus", "3") as server:
        everything = server.descendants()
        server.process.kill()
        server.process.wait()
        assert wait_until_gone(everything, 10) == []


def test_a_killed_rank_ends_the_server_with_its_name() -> None:
    with launched("--gpus", "3") as server:
        ranks = [
            process
            for process in server.descendants()
            if "RankActor" in " ".join(process.cmdline())
        ]
        ranks[0].kill()
        assert server.process.wait(timeout=20) == 1
        server.finish()
        assert re.search(r"error: rank \d died", "".join(server.lines))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["launch", "--gpus", "0", "--model", "mixtral-lite"], 2, "gpus is 0"),
        (["launch", "--gpus", "2", "--spares", "2", "--model", "mixtral-lite"], 2, "spares (2)"),
        (["launch", "--gpuz", "2"], 2, "Did you mean --gpus?"),
        (["launch", "--gpus", "two", "--model", "mixtral-lite"], 2, "two"),
        (["launch", "--gpus", "2"], 2, "--model"),
        (["launch", "--gpus", "2", "--model", "gpt-99"], 1, "mixtral-lite"),
        (["launch", "--gpus", "2", "--model", "mixtral-8x7b"], 1, "--load-format dummy"),
        (["launch", "--device", "cuda", "--gpus", "2", "--model", "mixtral-lite"], 1, "device cpu"),
        (["heatmap", "--url", "http://127.0.0.1:9"], 1, "lightmoe launch"),
    ],
)
def test_bad_usage_is_one_line_with_the_remedy(arguments: list[str], code: int, said: str) -> None:
    ran = subprocess.run([*LIGHTMOE, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == code
    assert said in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_a_port_in_use_is_said_before_anything_is_loaded(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    ran = subprocess.run(
        [*LIGHTMOE, "launch", "--gpus", "2", "--model", "mixtral-lite", "--port", port],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert ran.returncode == 1
    assert port in ran.stderr
    assert str(server.process.pid) in ran.stderr


def test_dummy_weights_take_token_ids_and_say_so(tmp_path: Path, checkout: Path) -> None:
    config = json.loads((checkout / "models/mixtral-lite/config.json").read_text())
    folder = tmp_path / "made-up"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with launched("--gpus", "2", "--load-format", "dummy", model=str(folder)) as server:
        with Client(server.url) as client:
            assert client.models()[0]["dummy_weights"] is True
            assert client.complete([1, 2, 3], max_tokens=4).num_completion_tokens == 4
        with (
            openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client,
            pytest.raises(openai.BadRequestError, match="token ids"),
        ):
            client.completions.create(model="made-up", prompt="text", max_tokens=4)


def test_the_environment_of_the_caller_is_left_alone() -> None:
    code = (
        "import os; from lightmoe import LLM; LLM('mixtral-lite', gpus=2).close();"
        "names = ('OMP_NUM_THREADS', 'RAY_USAGE_STATS_ENABLED');"
        "print([name for name in names if name in os.environ], oct(os.umask(0)))"
    )
    ours = ("OMP_NUM_THREADS", "RAY_USAGE_STATS_ENABLED")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        umask=0o022,
    )
    assert ran.stdout.strip() == "[] 0o22"
