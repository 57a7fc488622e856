"""Every answer that is an error, in OpenAI's shape: {"error": {message, type, param, code}}.

Messages are cut to a fixed length, so that no request can make a large answer by being echoed.
"""

from __future__ import annotations

import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lightmoe.errors import LightMoEError, RankError, RequestError

MAX_MESSAGE_LENGTH = 400
RETRY_AFTER_SECONDS = 1

logger = logging.getLogger("lightmoe.server")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES = {
    400: "bad_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    415: "unsupported_media_type",
}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error, for an answer of that status or an event in a stream."""
    if len(message) > MAX_MESSAGE_LENGTH:
        message = message[: MAX_MESSAGE_LENGTH - 4] + " ..."
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_answer(error: LightMoEError) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for an error of ours. Only what clients may know goes into it."""
    if isinstance(error, RequestError):
        body = error_body(error.http_status, str(error), error.param, error.code)
        return error.http_status, body
    if isinstance(error, RankError):
        return error.http_status, error_body(error.http_status, str(error), None, "rank_lost")
    logger.error("the engine failed a request: %s", error)
    return 500, error_body(500, "the engine failed; see the server's log", None, "internal_error")


def internal_error_body() -> dict[str, Any]:
    """The body for a bug of ours: no details, they are in the log."""
    return error_body(500, "an internal error; see the server's log", None, "internal_error")


def http_error_response(error: HTTPException) -> Response:
    """The answer for a routing or middleware error (401, 404, 405, 415, ...)."""
    body = error_body(error.status_code, error.detail, None, _CODES.get(error.status_code))
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler for HTTPException."""
    assert isinstance(error, HTTPException)
    if error.status_code in (404, 405):
        detail = f"there is no {request.method[:20]} {request.scope['path'][:200]} here"
        error = HTTPException(error.status_code, detail, error.headers)
    return http_error_response(error)


async def answer_own_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for our own errors; 429 and 503 say when to come back."""
    assert isinstance(error, LightMoEError)
    status, body = error_answer(error)
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in (429, 503) else None
    return JSONResponse(body, status_code=status, headers=headers)


async def answer_internal_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for everything else; the ASGI server writes the traceback to its log."""
    return JSONResponse(internal_error_body(), status_code=500)
