"""The page's switch on a whole server: five ranks, streams that run, and a route that changes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import httpx
import pytest

from lightmoe.engine.engine import Engine
from tests.models.folders import write_model
from tests.server.fakes import running_server
from tests.worker.groups import new_config, running_engine

PROMPTS = [[3 + one, 7, 7, 9] for one in range(4)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = write_model(tmp_path_factory.mktemp("tiny"), num_local_experts=8)
    with running_engine(new_config(folder, 5, num_spares=1), 4, 16) as engine:
        yield engine


def complete(url: str, prompt: list[int]) -> list[int]:
    body = {
        "prompt": prompt,
        "max_tokens": 40,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return token_ids


def test_tokens_are_equal_while_the_route_is_switched(engine: Engine) -> None:
    with running_server(engine, None) as url:  # type: ignore[arg-type]
        wanted = [complete(url, prompt) for prompt in PROMPTS]
        assert len(wanted[0]) == 40
        stop = threading.Event()
        found: list[tuple[int, list[int]]] = []

        def keep_asking(one: int) -> None:
            while not stop.is_set():
                found.append((one, complete(url, PROMPTS[one])))

        threads = [threading.Thread(target=keep_asking, args=(one,)) for one in range(4)]
        for thread in threads:
            thread.start()
        routes = itertools.islice(itertools.cycle(["none", "even", "waterfill"]), 12)
        spare_pairs = []
        for route in routes:
            answer = httpx.post(f"{url}/v1/experts/route", json={"route": route})
            assert answer.json() == {"route": route}
            steps = engine.stats().num_steps
            while engine.stats().num_steps < steps + 2:
                stop.wait(0.002)
            before = engine.load()
            while engine.stats().num_steps < before.num_steps + 5:
                stop.wait(0.002)
            after = httpx.get(f"{url}/v1/experts/load").json()
            assert after["route"] == route
            spare_pairs.append((route, sum(after["rank_pairs"][-1]) - before.rank_pairs[-1].sum()))
        stop.set()
        for thread in threads:
            thread.join()

    assert len(found) >= 4
    assert all(tokens == wanted[one] for one, tokens in found)
    # Without a route among the replicas, the spare has nothing to do.
    assert all((pairs == 0) == (route == "none") for route, pairs in spare_pairs)
