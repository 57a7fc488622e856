"""Who may talk to the server: the Host, Origin and key checks, before any route sees a request."""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Sequence
from hashlib import sha256
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightmoe.server.errors import http_error_response

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
OPEN_PATHS = frozenset({"/health", "/ready", "/"})
OPEN_PREFIX = "/static/"

_REQUEST_ID = re.compile(r"[\w.:+/=-]{1,128}", re.ASCII)


def allowed_hosts_for(bind_host: str) -> tuple[str, ...]:
    """The names that a browser may have used for a server bound to `bind_host`.

    On loopback only its names, so that no web page reaches the server by a name of its own that
    resolves to 127.0.0.1 (DNS rebinding). On other addresses the names are not known: any.
    """
    name = bind_host.strip("[]").lower()
    if name in LOOPBACK_HOSTS:
        return LOOPBACK_HOSTS
    try:
        is_loopback = ipaddress.ip_address(name).is_loopback
    except ValueError:
        is_loopback = False
    return (*LOOPBACK_HOSTS, name) if is_loopback else ("*",)


class Guard:
    """Middleware that turns away foreign hosts, foreign origins and missing keys.

    `allowed_hosts` with "*" takes any host. With `api_keys` every path but /health, /ready and the
    page itself needs `Authorization: Bearer KEY`; the keys are kept as digests only.
    """

    def __init__(
        self, app: ASGIApp, api_keys: Sequence[str] = (), allowed_hosts: Sequence[str] = ("*",)
    ) -> None:
        self._app = app
        self._key_digests = [sha256(key.encode()).digest() for key in api_keys]
        self._allowed_hosts = {host.lower() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        send = _with_request_id(send, headers.get("x-request-id", ""))
        try:
            self._check_host(headers)
            self._check_origin(headers)
            self._check_key(scope["path"], headers)
        except HTTPException as error:
            return await http_error_response(error)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        host = _host_name(headers.get("host", ""))
        if "*" not in self._allowed_hosts and host not in self._allowed_hosts:
            raise HTTPException(
                403, f"host {host[:100]!r} is not served; use the address that the server prints"
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None:
            return
        _, _, authority = origin.lower().partition("://")
        if authority != headers.get("host", "").lower():
            raise HTTPException(403, f"origin {origin[:100]!r} may not use this server")

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._key_digests or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Headers are decoded as Latin-1, which keeps every byte.
        given = sha256(key.strip().encode("latin-1")).digest()
        # All keys are compared, so that the time does not tell which one came close.
        matches = [secrets.compare_digest(given, digest) for digest in self._key_digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise HTTPException(
                401,
                "a valid key is needed: Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer"},
            )


def _host_name(authority: str) -> str:
    """`[::1]:8000` -> `::1`, `Localhost:8000` -> `localhost`."""
    match = re.fullmatch(r"\[([^\]]*)\](:\d*)?|([^:]*)(:\d*)?", authority.strip().lower())
    return "" if match is None else match[1] or match[3] or ""


def _with_request_id(send: Send, given: str) -> Send:
    """Every answer carries X-Request-Id: the client's own, or a new one."""
    request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["X-Request-Id"] = request_id
        await send(message)

    return send_with_id
