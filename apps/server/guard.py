"""Who may talk to the server: checks of Host, Origin and API key before any route sees a request.

A page elsewhere can make a browser send requests here, and a name of its own can lead here (DNS rebinding): so the
Host must be ours and an Origin, where there is one, the same. Pure ASGI; every reply also gets the headers that keep
a browser from doing more than it is told.
"""

from __future__ import annotations

import hmac
import socket
from collections.abc import Iterable
from http.cookies import SimpleCookie
from ipaddress import ip_address
from typing import Any

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.server.replies import Refusal, error_reply
from apps.server.settings import ServerSettings, is_loopback

COOKIE = "edgert-key"
# What a page needs before it has a key, and what a load balancer asks.
_OPEN_PATHS = ("/health", "/v1/health", "/", "/static/", "/edgert/session")
CONTENT_SECURITY_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
                           "font-src 'self'; connect-src 'self'; form-action 'none'; base-uri 'none'; "
                           "frame-ancestors 'none'")
_SAFETY = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
           "Content-Security-Policy": CONTENT_SECURITY_POLICY}
_CORS_METHODS, _CORS_HEADERS = "GET, POST, PATCH, PUT, DELETE", "authorization, content-type, x-edgert-client"


def client_of(request: Request, user: str | None = None) -> str:
    """Whose turn a request counts for in the queue: who it says it is, else where it comes from."""
    named = user or request.headers.get("x-edgert-client", "")[:128]
    return named or (request.client.host if request.client else "")


class Guard:
    """Wraps an application."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._local = is_loopback(settings.host)
        self._names = {"localhost", *map(str.lower, settings.allowed_hosts)}
        if not self._local:
            name = socket.gethostname().lower()
            self._names |= {name, f"{name}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        origin = connection.headers.get("origin")
        cors = origin if origin in self._settings.cors_origins else None
        headers = _encoded([*_SAFETY.items(), *_cors(cors)])

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        reply = self._refusal(connection, scope, origin, cors)
        await (reply or self._app)(scope, receive, send_safely)

    def _refusal(self, connection: HTTPConnection, scope: Scope, origin: str | None, cors: str | None) -> Any:
        host = connection.headers.get("host", "")
        if not self._is_ours(host):
            return error_reply(Refusal(403, f"the server does not answer to the name {host[:100]!r}",
                                       "Use its address, or start it with --allow-host NAME.", "host_not_allowed"))
        if origin is not None and cors is None and origin.partition("://")[2].lower() != host.lower():
            return error_reply(Refusal(403, f"pages of {origin[:100]!r} may not use the server",
                                       "Start it with --cors-origin ORIGIN to allow that.", "origin_not_allowed"))
        if scope["method"] == "OPTIONS" and cors is not None:
            return Response(status_code=204, headers={"Access-Control-Allow-Methods": _CORS_METHODS,
                                                      "Access-Control-Allow-Headers": _CORS_HEADERS})
        if not self._may_enter(connection, scope["path"]):
            return error_reply(Refusal(401, "the API key is missing or wrong",
                                       "Send it as `Authorization: Bearer KEY`.", "invalid_api_key"))
        return None

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.strip("[]").lower()
        try:
            address = ip_address(name)
        except ValueError:
            return name in self._names
        return address.is_loopback or not self._local

    def _may_enter(self, connection: HTTPConnection, path: str) -> bool:
        key = self._settings.api_key
        if key is None or any(path == one or (one.endswith("/") and one != "/" and path.startswith(one))
                              for one in _OPEN_PATHS):
            return True
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            cookie = SimpleCookie(connection.headers.get("cookie", "")[:4096]).get(COOKIE)
            given = cookie.value if cookie is not None else ""
        return same_key(given, key)


def same_key(given: str, key: str) -> bool:
    """Whether two keys are equal, in the same time for every wrong one."""
    return hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode())


def _cors(origin: str | None) -> Iterable[tuple[str, str]]:
    if origin is None:
        return ()
    return (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"))


def _encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
