"""Reads the bodies of requests within bounds of size and time."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from apps.server.replies import Refusal
from apps.server.settings import BODY_DEADLINE_S, MAX_BODY_BYTES
from edgert.errors import InvalidRequest


async def read_body(request: Request, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The body. Raises Refusal (413, 408, 400) for one that is too large, too slow, or cut off."""
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    parts, n_bytes = [], 0
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            async for part in request.stream():
                n_bytes += len(part)
                if n_bytes > max_bytes:
                    raise _too_large(max_bytes)
                parts.append(part)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {BODY_DEADLINE_S:.0f} s") from None
    except ClientDisconnect:
        raise Refusal(400, "the body was cut off") from None
    return b"".join(parts)


async def read_json(request: Request) -> Any:
    """The body as JSON; an empty one is an empty object. Raises Refusal and InvalidRequest."""
    body = await read_body(request)
    if not body.strip():
        return {}
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {str(error)[:200]}", "Send a JSON object.") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(413, f"the body has more than {max_bytes // 2**20} MiB", "Send less at once.", "too_large")
