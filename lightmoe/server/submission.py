"""Engine requests that belong to one HTTP request, bridged from the engine's thread to asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from lightmoe.core import Request, RequestOutput
from lightmoe.server.protocol import ServingEngine


class Submission:
    """Submits requests together and yields their outputs in the order in which they come.

    Whoever creates one must `close()` it: whatever still runs then is aborted in the engine.
    """

    def __init__(self, engine: ServingEngine, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._requests = tuple(requests)
        self._unfinished: set[int] = set()
        self._client_is_gone = False
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[tuple[int, RequestOutput] | None] = asyncio.Queue()

    def start(self) -> None:
        """Submits all. If the engine refuses one, the others are aborted and its error raised."""
        try:
            for index, request in enumerate(self._requests):
                self._engine.submit(request, partial(self._deliver, index))
                self._unfinished.add(index)
        except Exception:
            self.close()
            raise

    def _deliver(self, index: int, output: RequestOutput) -> None:
        try:
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, (index, output))
        except RuntimeError:
            # The loop was closed under a running request: the server is gone, nobody waits for
            # this, and the engine's thread must not end by it.
            assert self._loop.is_closed()

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Request index and output, until all are finished; ClientDisconnect if the client left."""
        while self._unfinished:
            item = await self._outputs.get()
            if item is None:
                break
            index, output = item
            if index not in self._unfinished:
                continue
            if output.finish_reason is not None:
                self._unfinished.discard(index)
            yield index, output
        if self._client_is_gone:
            raise ClientDisconnect

    def end(self, index: int) -> None:
        """Ends one request early; its later outputs are dropped."""
        if index in self._unfinished:
            self._unfinished.discard(index)
            self._engine.abort(self._requests[index].request_id)

    def close(self) -> None:
        """Aborts whatever has not finished."""
        for index in tuple(self._unfinished):
            self.end(index)

    @asynccontextmanager
    async def watching(self, receive: Receive) -> AsyncIterator[None]:
        """While inside, a client that hangs up closes the submission; on leaving it is closed."""
        watch = asyncio.create_task(self._watch(receive))
        try:
            yield
        finally:
            watch.cancel()
            self.close()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        self._client_is_gone = bool(self._unfinished)
        self.close()
        self._outputs.put_nowait(None)
