"""The GET routes that say what is served and how it is doing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lightmoe import __version__
from lightmoe.core import BalanceReport, LoadReport, OverflowReport
from lightmoe.errors import UnknownModelError
from lightmoe.server import metrics
from lightmoe.server.openapi import openapi_document
from lightmoe.server.protocol import ServingEngine
from lightmoe.server.service import Service


class Info:
    """Handlers that only read; `is_stopping` says whether the server is draining."""

    def __init__(self, service: Service, is_stopping: Callable[[], bool]) -> None:
        self._service = service
        self._is_stopping = is_stopping
        self._created = int(time.time())
        self._registry = metrics.new_registry(service.engine, service.model_names[0])

    def routes(self) -> list[Route]:
        """All of them."""
        handlers = {
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.one_model,
            "/v1/experts/load": self.expert_load,
            "/health": self.health,
            "/ready": self.ready,
            "/version": self.version,
            "/metrics": self.metrics,
            "/openapi.json": self.openapi,
        }
        return [Route(path, handler, methods=["GET"]) for path, handler in handlers.items()]

    async def models(self, request: Request) -> Response:
        """The served model under each of its names."""
        entries = [self._model_entry(name) for name in self._service.model_names]
        return JSONResponse({"object": "list", "data": entries})

    async def one_model(self, request: Request) -> Response:
        """One name, or 404."""
        name = request.path_params["name"]
        if name not in self._service.model_names:
            raise UnknownModelError(f"model {name[:200]!r} is not served here", "model")
        return JSONResponse(self._model_entry(name))

    def _model_entry(self, name: str) -> dict[str, Any]:
        model = self._service.model
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "lightmoe",
            "root": model.name,
            "parent": None,
            "max_model_len": model.max_model_len,
            "dummy_weights": model.dummy_weights,
            "routing_skew": model.routing_skew,
            "overflow": None if model.overflow is None else str(model.overflow),
            "vocab_size": model.vocab_size,
        }

    async def expert_load(self, request: Request) -> Response:
        """Expert load since the start."""
        report = self._service.engine.load()
        return JSONResponse({"model": self._service.model_names[0], **load_json(report)})

    async def health(self, request: Request) -> Response:
        """200 while the engine lives; a balancer that has died is told, and serving goes on."""
        engine = self._service.engine
        report = engine.balance()
        more = {} if report is None else {"balancer": _balancer_state(report)}
        return _state_response(_why_dead(engine), more)

    async def ready(self, request: Request) -> Response:
        """200 while new requests are taken."""
        why_not = _why_dead(self._service.engine)
        if why_not is None and self._is_stopping():
            why_not = "the server is draining"
        ranks = [
            {"rank": rank.rank, "kind": rank.kind} for rank in self._service.engine.stats().ranks
        ]
        return _state_response(why_not, {"ranks": ranks})

    async def version(self, request: Request) -> Response:
        """The version of this package."""
        return JSONResponse({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        """Prometheus text."""
        return Response(metrics.render(self._registry), media_type=metrics.CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        """What may be sent, for tools."""
        return JSONResponse(openapi_document(__version__))


def load_json(report: LoadReport) -> dict[str, Any]:
    """A LoadReport as JSON: expert_tokens [L][E], rank_pairs [W][L], placement [L][E][ranks]."""
    num_layers, num_experts = report.expert_tokens.shape
    return {
        "num_layers": num_layers,
        "num_experts": num_experts,
        "num_ranks": len(report.rank_kinds),
        "num_steps": report.num_steps,
        "epoch": report.epoch,
        "route": report.route,
        "balance": None if report.balance is None else _balance_json(report.balance),
        "overflow": None if report.overflow is None else _overflow_json(report.overflow),
        "rank_kinds": report.rank_kinds,
        "expert_tokens": report.expert_tokens.tolist(),
        "rank_pairs": report.rank_pairs.tolist(),
        "rank_seconds": report.rank_seconds,
        "placement": report.placement,
    }


def _balance_json(report: BalanceReport) -> dict[str, Any]:
    return {
        "state": _balancer_state(report),
        "num_migrations": report.num_migrations,
        "num_moved_experts": report.num_moved_experts,
        "moved_bytes": report.moved_bytes,
        "waited_seconds": report.waited_seconds,
        "heartbeat_age_seconds": round(report.heartbeat_age_seconds, 3),
        "events": [[event.epoch, event.text] for event in report.events],
    }


def _overflow_json(report: OverflowReport) -> dict[str, Any]:
    return {
        "mode": report.rule.mode,
        "capacity_factor": report.rule.capacity_factor,
        "num_moved_pairs": report.num_moved_pairs,
        "num_layers": report.num_layers,
        "num_left": report.num_left,
    }


def _balancer_state(report: BalanceReport) -> str:
    return "ok" if report.error is None else f"dead: {report.error}"


def _why_dead(engine: ServingEngine) -> str | None:
    return None if engine.error is None else str(engine.error)


def _state_response(why_not: str | None, more: dict[str, Any]) -> Response:
    if why_not is None:
        return JSONResponse({"status": "ok", **more})
    return JSONResponse({"status": "unavailable", "reason": why_not, **more}, status_code=503)
