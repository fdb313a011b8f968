"""/v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from apps.server.asked import Ended, Event, Prefill, Text, ToolCall, Waiting
from apps.server.bodies import read_json
from apps.server.guard import client_of
from apps.server.host import Host, Job
from apps.server.openai_requests import Request, read_chat, read_completion
from apps.server.openai_shapes import Reply
from apps.server.openai_shapes import usage as usage_of
from apps.server.replies import Json, Refusal, answering_errors, error_body
from apps.server.shelf import ShelfModel
from apps.server.streams import ClientGone, comment, event, sse, while_client_waits
from edgert.errors import EdgertError

_CLIENT_CLOSED = 499  # nginx's number; nobody reads it
# A streamed reply begins with its status. This long an error may still come in place of it; loading may take longer.
_PATIENCE_S = 3.0


class OpenAIRoutes:
    """The routes, over one host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def routes(self) -> list[Route]:
        return [Route("/v1/chat/completions", answering_errors(self.chat), methods=["POST"]),
                Route("/v1/completions", answering_errors(self.completion), methods=["POST"]),
                Route("/v1/models", answering_errors(self.models)),
                Route("/v1/models/{name:path}", answering_errors(self.model))]

    async def chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, read_chat(await read_json(request)))

    async def completion(self, request: HttpRequest) -> Response:
        return await self._answer(request, read_completion(await read_json(request)))

    async def models(self, _: HttpRequest) -> Response:
        return Json({"object": "list", "data": [self._model(model) for model in await self._host.shelf.list()]})

    async def model(self, request: HttpRequest) -> Response:
        wanted = request.path_params["name"]
        for model in await self._host.shelf.list():
            if model.name == wanted:
                return Json(self._model(model))
        raise Refusal(404, f"no model has the name {wanted[:100]!r}", "See /v1/models.", "model_not_found")

    def _model(self, model: ShelfModel) -> dict[str, Any]:
        loaded = self._host.loaded
        known = model.description
        return {"id": model.name, "object": "model", "created": model.modified_s, "owned_by": "edgert",
                "meta": {"size_bytes": model.size_bytes, "problem": model.problem or None,
                         "architecture": known.architecture if known else None,
                         "quantisation": known.quantisation if known else None,
                         "n_params": known.n_parameters if known else None,
                         "n_ctx_train": known.context_length if known else None,
                         "loaded": loaded is not None and loaded.path == model.path}}

    async def _answer(self, http: HttpRequest, request: Request) -> Response:
        job = await self._host.submit(request.model, request.asked, client_of(http, request.user))
        reply = Reply(request.kind, job.name)
        if request.form.stream:
            return await self._streamed(http, request, job, reply)
        try:
            return Json(await while_client_waits(http, collect(job, reply)))
        except ClientGone:
            return Response(status_code=_CLIENT_CLOSED)
        finally:
            job.cancel()

    async def _streamed(self, http: HttpRequest, request: Request, job: Job, reply: Reply) -> Response:
        """What is refused soon (a prompt that is too long) is still a reply with a status."""
        begun: list[Event] = []
        try:
            await while_client_waits(http, self._begin(job, begun))
        except ClientGone:
            job.cancel()
            return Response(status_code=_CLIENT_CLOSED)
        except BaseException:
            job.cancel()
            raise
        return sse(stream(job, begun, request, reply), job.cancel)

    async def _begin(self, job: Job, begun: list[Event]) -> None:
        """Take events until the prompt is accepted; of a job that has to wait, only check it."""
        await self._host.check(job)
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                while not job.place and (not begun or isinstance(begun[-1], Waiting)):
                    begun.append(await anext(job))


async def collect(job: Job, reply: Reply) -> Mapping[str, Any]:
    """A whole answer. Raises EdgertError."""
    parts: list[str] = []
    calls: list[ToolCall] = []
    logprobs: list[Mapping[str, Any]] | None = None if job.asked is None or job.asked.logprobs is None else []
    async for one in job:
        if isinstance(one, Text):
            parts.append(one.text)
            if logprobs is not None:
                logprobs.extend(one.logprobs or ())
        elif isinstance(one, ToolCall):
            calls.append(one)
        elif isinstance(one, Ended):
            return reply.whole("".join(parts), calls, logprobs, one)
    raise EdgertError("the request was cancelled")


async def stream(job: Job, begun: Sequence[Event], request: Request, reply: Reply) -> AsyncIterator[bytes]:
    """The chunks of an answer as server-sent events; an error in the middle is an event too."""
    before, after = reply.text_prefix()
    n_chars = n_calls = 0
    said_role = reply.kind == "completion"
    try:
        async for one in _chained(begun, job):
            if isinstance(one, Waiting | Prefill):
                yield event(reply.progress(one)) if request.form.progress else comment(_told(one))
                continue
            if not said_role:
                said_role = True
                yield event(reply.role())
            if isinstance(one, Text):
                if one.logprobs is not None:
                    yield event(reply.piece(one, n_chars))
                elif one.text:
                    yield f"data: {before}{json.dumps(one.text)}{after}\n\n".encode()
                n_chars += len(one.text)
            elif isinstance(one, ToolCall):
                yield event(reply.call(one, n_calls))
                n_calls += 1
            else:
                yield event(reply.end(one))
                if request.form.usage:
                    yield event(reply.chunk([], usage=usage_of(one)))
                yield event("[DONE]")
    except EdgertError as error:
        yield event(error_body(error))


async def _chained(begun: Sequence[Event], job: Job) -> AsyncIterator[Event]:
    for one in begun:
        yield one
    async for one in job:
        yield one


def _told(one: Waiting | Prefill) -> dict[str, Any]:
    if isinstance(one, Prefill):
        return {"prompt_tokens_done": one.n_done, "prompt_tokens": one.n_total}
    return {"loading": one.loading} if one.loading else {"requests_ahead": one.place}
