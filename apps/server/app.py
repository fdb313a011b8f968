"""Puts the server's application together: routes over one host, behind the guard."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from apps.server.guard import COOKIE, Guard, same_key
from apps.server.host import Host
from apps.server.ollama_routes import OllamaRoutes
from apps.server.openai_routes import OpenAIRoutes
from apps.server.openapi import description
from apps.server.replies import Json, Refusal, answering_errors, error_reply
from apps.server.settings import ServerSettings
from apps.server.state_routes import StateRoutes
from edgert.memory.probe import MemoryProbe


class Part:
    """More routes, and what they need to be closed. The chat page is one (apps/chat/part.py)."""

    routes: Sequence[BaseRoute] = ()

    async def open(self) -> None:
        """The event loop runs now."""

    async def close(self) -> None:
        """Give back what `open` took."""


def build_app(host: Host, make_parts: Callable[[Host], Sequence[Part]] = lambda _: ()) -> ASGIApp:
    """The application; its lifespan opens the host and every part."""
    settings, parts = host.settings, make_parts(host)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as opened:
            await opened.enter_async_context(host)
            for part in parts:
                await part.open()
                opened.push_async_callback(part.close)
            yield

    routes: list[BaseRoute] = [*OpenAIRoutes(host).routes(), *OllamaRoutes(host).routes(),
                               *StateRoutes(host, MemoryProbe()).routes(), *_own_routes(settings)]
    for part in parts:
        routes.extend(part.routes)
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _not_found})
    return Guard(app, settings)


def _own_routes(settings: ServerSettings) -> list[Route]:
    async def openapi(_: Request) -> Response:
        return Json(description())

    async def session(request: Request) -> Response:
        """Lets a page in: the key becomes a cookie that scripts cannot read and that other sites do not send."""
        given = request.headers.get("authorization", "").partition(" ")[2]
        if settings.api_key is not None and not same_key(given, settings.api_key):
            raise Refusal(401, "the API key is wrong", "Look where the server was started.", "invalid_api_key")
        reply = Json({"ok": True})
        reply.set_cookie(COOKIE, given, httponly=True, samesite="strict")
        return reply

    return [Route("/openapi.json", openapi), Route("/edgert/session", answering_errors(session), methods=["POST"])]


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = "does not take" if error.status_code == 405 else "is no path here, for"
    reply = error_reply(Refusal(error.status_code, f"{request.url.path[:200]} {what} {request.method}",
                                "See /openapi.json."))
    reply.headers.update(error.headers or {})
    return reply
