"""The bridge from the engine's thread to asyncio."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from lightmoe.core import Request, RequestOutput, SamplingParams
from lightmoe.server.submission import Submission
from tests.server.fakes import FakeEngine


def requests(count: int) -> list[Request]:
    return [
        Request(request_id=str(index), prompt_token_ids=(2,), params=SamplingParams(max_tokens=3))
        for index in range(count)
    ]


async def collect(submission: Submission) -> list[tuple[int, RequestOutput]]:
    return [item async for item in submission.outputs()]


def test_outputs_of_all_come_and_nothing_is_aborted(engine: FakeEngine) -> None:
    async def run() -> list[tuple[int, RequestOutput]]:
        submission = Submission(engine, requests(3))
        submission.start()
        items = await collect(submission)
        submission.close()
        return items

    items = asyncio.run(run())
    for index in range(3):
        mine = [output for owner, output in items if owner == index]
        assert [output.finish_reason for output in mine] == [None, None, "length"]
        assert {output.request_id for output in mine} == {str(index)}
    assert engine.aborted == []


def test_a_request_that_is_ended_gives_no_more_outputs(engine: FakeEngine) -> None:
    async def run() -> list[int]:
        submission = Submission(engine, requests(2))
        submission.start()
        seen = []
        async for index, _ in submission.outputs():
            seen.append(index)
            submission.end(1)
        return seen

    assert asyncio.run(run()).count(1) <= 1
    assert engine.aborted == ["1"]


def test_a_client_that_hangs_up_ends_the_wait(engine: FakeEngine) -> None:
    engine.hold_after = 1

    async def run() -> None:
        gone = asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        submission = Submission(engine, requests(2))
        submission.start()
        async with submission.watching(receive):
            asyncio.get_running_loop().call_later(0.05, gone.set)
            with pytest.raises(ClientDisconnect):
                await collect(submission)

    asyncio.run(run())
    assert sorted(engine.aborted) == ["0", "1"]


def test_outputs_after_the_loop_has_ended_do_not_reach_the_engine() -> None:
    callbacks: list[Any] = []

    class Recorder:
        def submit(self, request: Request, on_output: Any) -> None:
            callbacks.append(on_output)

    async def start() -> None:
        Submission(Recorder(), requests(1)).start()  # type: ignore[arg-type]

    asyncio.run(start())
    callbacks[0](RequestOutput("0"))
