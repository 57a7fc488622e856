"""What the server needs of an engine. The real Engine fits by its shape; tests pass a fake."""

from __future__ import annotations

from typing import Protocol

from lightmoe.core import BalanceReport, EngineStats, LoadReport, ModelInfo, OutputCallback, Request
from lightmoe.errors import LightMoEError


class ServingEngine(Protocol):
    """Runs requests on a thread of its own. Every member may be used from any thread."""

    @property
    def model(self) -> ModelInfo:
        """The served model."""

    @property
    def error(self) -> LightMoEError | None:
        """Why the engine has died; None while it runs."""

    def submit(self, request: Request, on_output: OutputCallback) -> None:
        """Queues a request, or raises a RequestError. `on_output` runs on the engine's thread."""

    def abort(self, request_id: str) -> None:
        """Ends a request early; unknown and finished ids are ignored."""

    def load(self) -> LoadReport:
        """Expert load since the start."""

    def balance(self) -> BalanceReport | None:
        """How the balancer is; None where there is none."""

    def set_route(self, route: str) -> None:
        """Routes by "waterfill", "even" or "none" from the next step on."""

    def stats(self) -> EngineStats:
        """Counters since the start, and what runs now."""
