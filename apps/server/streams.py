"""Server-sent events with signs of life, and waiting for an answer only as long as its client is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse

from apps.server.settings import PING_S

T = TypeVar("T")
PING = b": ping\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """Nobody waits for the reply any more."""


def event(data: Any, name: str | None = None) -> bytes:
    """One event. JSON has no line breaks of its own, so one `data:` line is enough."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode("utf-8", errors="replace")


def comment(data: Any) -> bytes:
    """A line that clients pass over: for people who watch, and to keep a connection open."""
    return f": {json.dumps(data)}\n\n".encode()


async def with_pings(source: AsyncIterator[bytes], ping: bytes = PING, every_s: float = PING_S) -> AsyncIterator[bytes]:
    """The items of `source`, and `ping` whenever none has come for a while."""
    pending = asyncio.ensure_future(anext(source))
    try:
        while True:
            done, _ = await asyncio.wait((pending,), timeout=every_s)
            if not done:
                yield ping
                continue
            try:
                item = pending.result()
            except StopAsyncIteration:
                return
            pending = asyncio.ensure_future(anext(source))
            yield item
    finally:
        pending.cancel()


def sse(source: AsyncIterator[bytes], on_end: Callable[[], None], every_s: float = PING_S) -> StreamingResponse:
    """A reply that streams events; `on_end` is called when it is over or its client has gone."""

    async def lines() -> AsyncIterator[bytes]:
        try:
            async for item in with_pings(source, every_s=every_s):
                yield item
        finally:
            on_end()

    return StreamingResponse(lines(), media_type="text/event-stream", headers=_HEADERS)


async def while_client_waits(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client closes its connection. Raises ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
