"""Errors as OpenAI writes them, and the JSON of every other reply.

Knows which error is whose fault: 4xx is the client's, 5xx ours. Does not know routes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edgert import errors
from edgert.errors import EdgertError

_log = logging.getLogger(__name__)
# The nearest class wins: (HTTP status, OpenAI's type, its code).
_KINDS: dict[type[EdgertError], tuple[int, str, str | None]] = {
    errors.ContextOverflow: (400, "invalid_request_error", "context_length_exceeded"),
    errors.InvalidRequest: (400, "invalid_request_error", None),
    errors.GrammarError: (400, "invalid_request_error", "invalid_schema"),
    errors.UsageError: (400, "invalid_request_error", None),
    errors.ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    errors.QueueFull: (429, "rate_limit_error", "queue_full"),
    errors.TemplateError: (400, "invalid_request_error", "no_chat_template"),
    errors.BudgetTooSmall: (400, "invalid_request_error", "budget_too_small"),
    errors.OutOfMemory: (503, "server_error", "out_of_memory"),
    errors.ModelCrashed: (500, "server_error", "model_crashed"),
    EdgertError: (500, "server_error", None),
}
Route = Callable[[Request], Awaitable[Response]]


class Json(Response):
    """A JSON reply, compact."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")


class Refusal(EdgertError):
    """A reply with a status of its own: not found, too large, not allowed."""

    def __init__(self, status: int, message: str, next_step: str = "", code: str | None = None) -> None:
        super().__init__(message, next_step)
        self.status, self.code = status, code


def error_body(error: EdgertError) -> dict[str, Any]:
    """OpenAI's shape; the figures of a context that is too short are there too."""
    _, kind, code = _classified(error)
    body: dict[str, Any] = {"message": f"{error.message}. {error.next_step}" if error.next_step else error.message,
                            "type": kind, "param": getattr(error, "param", None), "code": code}
    if isinstance(error, errors.ContextOverflow):
        body |= {"n_prompt_tokens": error.n_tokens, "n_ctx": error.context_length, "param": "messages"}
    return {"error": body}


def error_reply(error: EdgertError) -> Response:
    """The reply that tells an error."""
    reply = Json(error_body(error), _classified(error)[0])
    if isinstance(error, errors.QueueFull):
        reply.headers["Retry-After"] = str(error.retry_after_s)
    if reply.status_code == 401:
        reply.headers["WWW-Authenticate"] = "Bearer"
    return reply


def _classified(error: EdgertError) -> tuple[int, str, str | None]:
    if isinstance(error, Refusal):
        return error.status, "invalid_request_error", error.code
    return next(_KINDS[kind] for kind in type(error).__mro__ if kind in _KINDS)


def answering_errors(route: Route) -> Route:
    """`route`, with EdgertErrors as replies, and a defect as a 500 that tells nothing of the machine."""

    @wraps(route)
    async def guarded(request: Request) -> Response:
        try:
            return await route(request)
        except EdgertError as error:
            return error_reply(error)
        except Exception:
            _log.exception("a defect in %s", request.url.path)
            return error_reply(EdgertError("internal error", "This is a defect in edgert; its log says more."))

    return guarded
