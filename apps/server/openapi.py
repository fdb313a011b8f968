"""The API in OpenAPI's words, for tools that read it: paths, bodies and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import edgert

_TEXT: dict[str, Any] = {"type": "string"}
_FLAG: dict[str, Any] = {"type": "boolean"}
_MODEL = {**_TEXT, "maxLength": 4096, "description": "a name of /v1/models; the served model where it is left out"}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {
    "type": "object", "required": ["message", "type", "param", "code"],
    "properties": {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]},
                   "code": {"type": ["string", "null"]}}}}}
_STATUSES = {"400": "what was sent makes no sense, or does not fit the context", "401": "the API key is wrong",
             "403": "another site's page, or a name that is not the server's", "404": "no such model or path",
             "405": "another method", "408": "the body came too slowly", "413": "the body is too large",
             "429": "the queue is full: see Retry-After", "500": "the model failed", "503": "no memory, or loading"}


def _whole(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def _number(low: float, high: float) -> dict[str, Any]:
    return {"type": "number", "minimum": low, "maximum": high}


_SAMPLING: dict[str, Any] = {
    "temperature": _number(0, 100), "top_p": _number(0, 1), "top_k": _whole(0, 2**31 - 1), "min_p": _number(0, 1),
    "repeat_penalty": _number(0.01, 100), "frequency_penalty": _number(-2, 2), "presence_penalty": _number(-2, 2),
    "seed": _whole(0, 2**32 - 2), "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)}}
_ANSWER: dict[str, Any] = {
    "model": _MODEL, **_SAMPLING, "max_tokens": _whole(1, 2**31 - 1), "stream": _FLAG,
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 32}]},
    "stream_options": {"type": "object", "properties": {"include_usage": _FLAG}}, "return_progress": _FLAG,
    "response_format": {"type": "object", "required": ["type"], "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": {"type": "object", "properties": {"name": _TEXT, "schema": {"type": "object"}}}}},
    "grammar": {**_TEXT, "description": "GBNF"}, "user": {**_TEXT, "maxLength": 256}}
_MESSAGE = {"type": "object", "required": ["role", "content"], "properties": {
    "role": {"enum": ["system", "developer", "user", "assistant", "tool"]}, "content": _TEXT}}
_FUNCTION = {"type": "object", "required": ["type", "function"], "properties": {
    "type": {"const": "function"},
    "function": {"type": "object", "required": ["name"], "properties": {
        "name": {**_TEXT, "maxLength": 64}, "description": _TEXT, "parameters": {"type": "object"}}}}}
_OLLAMA = {"model": _MODEL, "stream": _FLAG, "format": {}, "options": {"type": "object", "properties": {
    **_SAMPLING, "num_predict": _whole(-2, 2**31 - 1)}}}


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(required)}


def _operation(summary: str, body: Mapping[str, Any] | None = None, parameters: Mapping[str, Any] | None = None,
               kinds: tuple[str, ...] = ("application/json",)) -> dict[str, Any]:
    responses = {status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
                 for status, text in _STATUSES.items()}
    operation: dict[str, Any] = {"summary": summary, "responses": {
        "200": {"description": "done", "content": {kind: {} for kind in kinds}}, **responses}}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if parameters:
        operation["parameters"] = [{"name": name, "in": "query", "schema": schema}
                                   for name, schema in parameters.items()]
    return operation


def description() -> dict[str, Any]:
    """The whole document, OpenAPI 3.1."""
    streamed = ("application/json", "text/event-stream")
    lines = ("application/json", "application/x-ndjson")
    chat = _object({**_ANSWER, "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
                    "tools": {"type": "array", "items": _FUNCTION, "maxItems": 128},
                    "tool_choice": {"enum": ["none", "auto", "required"]}, "logprobs": _FLAG,
                    "top_logprobs": _whole(0, 20)}, "messages")
    completion = _object({**_ANSWER, "prompt": {**_TEXT, "minLength": 1}, "logprobs": _whole(0, 20)}, "prompt")
    posts = {
        "/v1/chat/completions": _operation("Answer a conversation", chat, kinds=streamed),
        "/v1/completions": _operation("Continue a text", completion, kinds=streamed),
        "/edgert/models/load": _operation("Load a model within a budget of bytes", _object(
            {"model": _MODEL, "memory": {"type": ["integer", "null"], "minimum": 1}, "context": _whole(0, 2**24)})),
        "/edgert/models/unload": _operation("Give the model's memory back"),
        "/edgert/tokens": _operation("Count tokens", _object(
            {"texts": {"type": "array", "items": _TEXT, "maxItems": 64}, "model": _MODEL}, "texts")),
        "/api/chat": _operation("Ollama's chat", _object(
            {**_OLLAMA, "messages": {"type": "array", "items": _MESSAGE}}, "messages"), kinds=lines),
        "/api/generate": _operation("Ollama's generate", _object({**_OLLAMA, "prompt": _TEXT, "system": _TEXT,
                                                                  "raw": _FLAG}), kinds=lines),
        "/api/show": _operation("Ollama's show", _object({"model": _MODEL}, "model")),
    }
    gets = {
        "/v1/models": _operation("The models that can be asked"),
        "/health": _operation("Whether the server answers"),
        "/metrics": _operation("Prometheus' page", kinds=("text/plain",)),
        "/edgert/state": _operation("Plan, memory, queue, progress"),
        "/edgert/models": _operation("The models with a forecast for each"),
        "/edgert/forecast": _operation("What a model would do within a budget", parameters={
            "model": _TEXT, "memory": _whole(1, 2**50), "context": _whole(8, 2**24)}),
        "/api/tags": _operation("Ollama's list"), "/api/ps": _operation("Ollama's loaded models"),
        "/api/version": _operation("The version"),
    }
    paths = {**{path: {"post": one} for path, one in posts.items()},
             **{path: {"get": one} for path, one in gets.items()}}
    return {"openapi": "3.1.0", "info": {"title": "edgert", "version": edgert.__version__}, "paths": paths}
