"""Ollama's API as a thin adapter: its names for the same requests, newline-separated JSON, times in nanoseconds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

import edgert
from apps.server.asked import Asked, Ended, Text, ToolCall
from apps.server.bodies import read_json
from apps.server.fields import Fields
from apps.server.guard import client_of
from apps.server.host import Host, Job
from apps.server.openai_requests import MAX_MESSAGES, read_message, read_sampling, read_stop, read_tools
from apps.server.replies import Json, Refusal, answering_errors, error_body
from apps.server.shelf import ShelfModel
from apps.server.streams import ClientGone, while_client_waits
from edgert.errors import EdgertError

_NS_PER_MS = 1_000_000
_REASONS = {"tool_calls": "stop", "cancelled": "stop"}


class OllamaRoutes:
    """The routes, over one host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def routes(self) -> list[Route]:
        return [Route("/api/version", answering_errors(self.version)), Route("/api/tags", answering_errors(self.tags)),
                Route("/api/ps", answering_errors(self.running)),
                Route("/api/show", answering_errors(self.show), methods=["POST"]),
                Route("/api/chat", answering_errors(self.chat), methods=["POST"]),
                Route("/api/generate", answering_errors(self.generate), methods=["POST"])]

    async def version(self, _: Request) -> Response:
        return Json({"version": edgert.__version__})

    async def tags(self, _: Request) -> Response:
        return Json({"models": [_tag(model) for model in await self._host.shelf.list()]})

    async def running(self, _: Request) -> Response:
        loaded = self._host.loaded
        models = [model for model in await self._host.shelf.list() if loaded is not None and model.path == loaded.path]
        return Json({"models": [{**_tag(model), "size_vram": 0} for model in models]})

    async def show(self, request: Request) -> Response:
        fields = Fields(await read_json(request))
        _, path = await self._host.shelf.find(_name(fields, "model") or _name(fields, "name"))
        model = next((one for one in await self._host.shelf.list() if one.path == path), None)
        if model is None or model.description is None:
            raise Refusal(404, "the model cannot be read", "Fetch it again.", "model_not_found")
        known = model.description
        info = {"general.architecture": known.architecture, "general.parameter_count": known.n_parameters,
                f"{known.architecture}.context_length": known.context_length}
        return Json({"details": _tag(model)["details"], "capabilities": ["completion", "tools"],
                     "license": known.licence, "model_info": info})

    async def chat(self, request: Request) -> Response:
        fields = Fields(await read_json(request))
        messages = tuple(read_message(_with_text(one), f"messages[{i}]")
                         for i, one in enumerate(fields.items("messages", MAX_MESSAGES)))
        asked = Asked(messages=messages, tools=read_tools(fields), **_options(fields)) if messages else None
        return await self._answer(request, fields, asked, chat=True)

    async def generate(self, request: Request) -> Response:
        fields = Fields(await read_json(request))
        prompt = fields.text("prompt", "") or ""
        system = fields.text("system")
        if not prompt:
            asked = None
        elif fields.flag("raw"):
            asked = Asked(prompt=prompt, **_options(fields))
        else:
            messages = [*([{"role": "system", "content": system}] if system else []),
                        {"role": "user", "content": prompt}]
            asked = Asked(messages=tuple(messages), **_options(fields))
        return await self._answer(request, fields, asked, chat=False)

    async def _answer(self, request: Request, fields: Fields, asked: Asked | None, *, chat: bool) -> Response:
        """Without anything to answer, Ollama's clients only want the model loaded."""
        job = await self._host.submit(_name(fields, "model"), asked, client_of(request))
        if fields.flag("stream", True):
            return StreamingResponse(_lines(job, chat), media_type="application/x-ndjson")
        try:
            return Json(await while_client_waits(request, _whole(job, chat)))
        except ClientGone:
            return Response(status_code=499)
        finally:
            job.cancel()


async def _lines(job: Job, chat: bool) -> AsyncIterator[bytes]:
    try:
        async for one in _objects(job, chat):
            yield json.dumps(one, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"
    except EdgertError as error:
        yield json.dumps({"error": error_body(error)["error"]["message"]}).encode() + b"\n"
    finally:
        job.cancel()


async def _objects(job: Job, chat: bool) -> AsyncIterator[dict[str, Any]]:
    ended: Ended | None = None
    async for one in job:
        if isinstance(one, Text) and one.text:
            yield _piece(job.name, chat, one.text)
        elif isinstance(one, ToolCall):
            call = {"function": {"name": one.name, "arguments": json.loads(one.arguments)}}
            yield _piece(job.name, chat, "", [call])
        elif isinstance(one, Ended):
            ended = one
    yield {**_piece(job.name, chat, ""), "done": True, **(_figures(ended) if ended else {"done_reason": "load"})}


async def _whole(job: Job, chat: bool) -> dict[str, Any]:
    text, calls, last = "", [], {}
    async for one in _objects(job, chat):
        message = one["message"] if chat else one
        text += message["content" if chat else "response"]
        calls += message.get("tool_calls", [])
        last = one
    said = _piece("", chat, text, calls)
    return {**last, **{key: said[key] for key in ("message" if chat else "response",)}}


def _piece(model: str, chat: bool, text: str, calls: list[Any] | None = None) -> dict[str, Any]:
    said = {"message": {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}} if chat \
        else {"response": text}
    return {"model": model, "created_at": datetime.now(UTC).isoformat(), **said, "done": False}


def _figures(ended: Ended) -> dict[str, Any]:
    timings = ended.timings
    return {"done_reason": _REASONS.get(ended.finish_reason, ended.finish_reason),
            "total_duration": int((timings["prompt_ms"] + timings["predicted_ms"]) * _NS_PER_MS), "load_duration": 0,
            "prompt_eval_count": ended.prompt_tokens,
            "prompt_eval_duration": int(timings["prompt_ms"] * _NS_PER_MS), "eval_count": ended.completion_tokens,
            "eval_duration": int(timings["predicted_ms"] * _NS_PER_MS)}


def _options(fields: Fields) -> dict[str, Any]:
    """Ollama's `options` and `format`, as Asked has them."""
    options = fields.object("options") or Fields({})
    max_tokens = options.whole("num_predict", -2, 2**31 - 1)
    form = fields.raw("format")
    schema: Any = {"type": "object"} if form == "json" else form if isinstance(form, Mapping) else None
    return {"max_tokens": max_tokens if max_tokens and max_tokens > 0 else None, "stop": read_stop(options),
            "sampling": read_sampling(options), "json_schema": schema}


def _with_text(message: Any) -> Any:
    """Ollama's messages may lack their content."""
    return {"content": "", **message} if isinstance(message, Mapping) else message


def _name(fields: Fields, key: str) -> str | None:
    """Ollama's clients add `:latest` to a name without a tag."""
    name = fields.text(key, None, 4096)
    return name.removesuffix(":latest") if name else None


def _tag(model: ShelfModel) -> dict[str, Any]:
    known = model.description
    modified = datetime.fromtimestamp(model.modified_s, UTC).isoformat()
    return {"name": model.name, "model": model.name, "modified_at": modified, "size": model.size_bytes, "digest": "",
            "details": {"format": "gguf", "family": known.architecture if known else "",
                        "parameter_size": f"{known.n_parameters / 1e6:.0f}M" if known else "",
                        "quantization_level": known.quantisation if known else ""}}
