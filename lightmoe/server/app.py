"""The HTTP server as an ASGI application: routes, guards and error handlers around one engine.

It owns no thread and no socket; launch.py runs it. To drain, the engine refuses what is submitted
(ShuttingDownError, a 503) while open answers run on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lightmoe.errors import LightMoEError
from lightmoe.server.chat import chat
from lightmoe.server.completions import complete
from lightmoe.server.dashboard import dashboard_routes
from lightmoe.server.errors import answer_http_exception, answer_internal_error, answer_own_error
from lightmoe.server.guard import LOOPBACK_HOSTS, Guard, allowed_hosts_for
from lightmoe.server.info import Info
from lightmoe.server.protocol import ServingEngine
from lightmoe.server.routing import set_route
from lightmoe.server.service import Service
from lightmoe.server.tokenizer import Tokenizer

__all__ = ["allowed_hosts_for", "create_app"]

Handler = Callable[[Service, Request], Awaitable[Response]]


def create_app(
    engine: ServingEngine,
    tokenizer: Tokenizer | None,
    *,
    api_keys: Sequence[str] = (),
    served_model_names: Sequence[str] = (),
    allowed_hosts: Sequence[str] = LOOPBACK_HOSTS,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Starlette:
    """The application that serves one engine.

    | argument | meaning |
    |---|---|
    | tokenizer | None: prompts are token ids only, answers carry `token_ids` |
    | api_keys | any of them opens the guarded routes; none: all routes are open |
    | served_model_names | names for requests and answers; none: the engine's own |
    | allowed_hosts | `allowed_hosts_for(host)` of the address bound |
    | is_stopping | true while draining: /ready says 503 and the page's feeds end |
    """
    service = Service(engine, tokenizer, tuple(served_model_names) or (engine.model.name,))
    app = Starlette(
        routes=[
            Route("/v1/completions", partial(_serve, service, complete), methods=["POST"]),
            Route("/v1/chat/completions", partial(_serve, service, chat), methods=["POST"]),
            Route("/v1/experts/route", partial(_serve, service, set_route), methods=["POST"]),
            *Info(service, is_stopping).routes(),
            *dashboard_routes(engine, has_tokenizer=tokenizer is not None, is_stopping=is_stopping),
        ],
        middleware=[Middleware(Guard, api_keys=api_keys, allowed_hosts=allowed_hosts)],
        exception_handlers={
            HTTPException: answer_http_exception,
            LightMoEError: answer_own_error,
            ClientDisconnect: _answer_nobody,
            Exception: answer_internal_error,
        },
    )
    # A redirect would be answered with a GET by many clients, and is no JSON.
    app.router.redirect_slashes = False
    return app


async def _serve(service: Service, handler: Handler, request: Request) -> Response:
    if service.engine.error is not None:
        raise service.engine.error
    return await handler(service, request)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client has left; the status is for the access log only."""
    return Response(status_code=499)
