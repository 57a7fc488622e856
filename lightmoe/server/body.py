"""Reading the body of a POST: its kind, its length, and nothing else."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import Request

from lightmoe.errors import RequestTooLargeError

MAX_BODY_BYTES = 4 * 2**20
BODY_SECONDS = 60.0


async def read_json_body(request: Request) -> bytes:
    """The body of a JSON request.

    Raises HTTPException 415 for other kinds and 408 for one that does not come, and
    RequestTooLargeError over 4 MiB.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise HTTPException(415, "compressed bodies are not taken; leave Content-Encoding out")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read(request)
    except TimeoutError:
        raise HTTPException(
            408, f"the body did not come within {BODY_SECONDS} s", {"Connection": "close"}
        ) from None


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
    return bytes(body)


def _too_large() -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the body is over the limit of {MAX_BODY_BYTES} bytes (4 MiB); send less at once"
    )
