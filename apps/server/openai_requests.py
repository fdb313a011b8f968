"""Reads OpenAI's request bodies into `Asked`. Every field that changes an answer is obeyed or refused by name.

Fields that only say who asks or where to keep things (`user`, `store`, `metadata`, `service_tier`) are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from apps.server.asked import Asked, ToolChoice
from apps.server.fields import Fields, check_text
from edgert.errors import InvalidRequest
from edgert.text.logprobs import MAX_TOP_LOGPROBS
from edgert.text.stream import MAX_STOP_CHARS, MAX_STOPS

MAX_MESSAGES = 10_000
_MAX_TOOLS, _MAX_NAME_CHARS = 128, 64  # OpenAI's own bounds
_MAX_TOKENS = 2**31 - 1
_MAX_SEED = 2**32 - 2
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What a text model cannot do; asking for it is answered instead of passed over.
_REFUSED = ("audio", "functions", "function_call", "web_search_options", "suffix")


@dataclass(frozen=True, slots=True)
class Form:
    """How an answer is sent. `tokens` in OpenAI's older form of logprobs (completions)."""

    stream: bool
    usage: bool  # a last chunk with the token counts
    progress: bool  # chunks about the queue and the prompt, for clients that know them


@dataclass(frozen=True, slots=True)
class Request:
    """A request that was read: which model, who asks (for the queue), what, and in which form."""

    model: str | None
    user: str | None
    asked: Asked
    form: Form
    kind: Literal["chat", "completion"]


def read_chat(body: Any) -> Request:
    """A body of /v1/chat/completions. Raises InvalidRequest."""
    fields = Fields(body)
    _refuse(fields)
    messages = tuple(read_message(one, f"messages[{i}]")
                     for i, one in enumerate(fields.items("messages", MAX_MESSAGES)))
    if not messages:
        raise InvalidRequest("messages is empty", "Send at least one message.", "messages")
    schema, grammar = _response_format(fields)
    tools = read_tools(fields)
    if tools is not None and tools.use != "none" and (schema is not None or grammar is not None):
        raise InvalidRequest("tools and response_format exclude each other", "Send tool_choice none, or one of them.",
                             "response_format")
    wanted = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    logprobs = (wanted or 0) if fields.flag("logprobs") else None
    if wanted is not None and logprobs is None:
        raise InvalidRequest("top_logprobs needs logprobs", "Send logprobs: true.", "top_logprobs")
    max_tokens = fields.whole("max_completion_tokens", 1, _MAX_TOKENS) or fields.whole("max_tokens", 1, _MAX_TOKENS)
    asked = Asked(messages=messages, max_tokens=max_tokens, stop=read_stop(fields), sampling=read_sampling(fields),
                  json_schema=schema, grammar=grammar, tools=tools, logprobs=logprobs)
    return Request(_model(fields), fields.text("user", None, 256), asked, _form(fields), "chat")


def read_completion(body: Any) -> Request:
    """A body of /v1/completions. Raises InvalidRequest."""
    fields = Fields(body)
    _refuse(fields)
    if fields.flag("echo"):
        raise InvalidRequest("echo is not supported", "Leave it out: the prompt is yours already.", "echo")
    schema, grammar = _response_format(fields)
    asked = Asked(prompt=_prompt(fields), max_tokens=fields.whole("max_tokens", 1, _MAX_TOKENS, 16),
                  stop=read_stop(fields), sampling=read_sampling(fields), json_schema=schema, grammar=grammar,
                  logprobs=fields.whole("logprobs", 0, MAX_TOP_LOGPROBS))
    return Request(_model(fields), fields.text("user", None, 256), asked, _form(fields), "completion")


def read_sampling(fields: Fields) -> dict[str, Any]:
    """The fields of SamplingParams that the request names, by llama-server's names where OpenAI has none."""
    values: dict[str, Any] = {
        "temperature": _temperature(fields),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.whole("top_k", 0, _MAX_TOKENS),
        "min_p": fields.number("min_p", 0, 1),
        "repeat_penalty": fields.number("repeat_penalty", 0.01, 100),
        "repeat_last_n": fields.whole("repeat_last_n", 0, 2**17),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "seed": _seed(fields),
        "logit_bias": _logit_bias(fields),
    }
    return {name: value for name, value in values.items() if value is not None}


def _temperature(fields: Fields) -> float | None:
    value = fields.number("temperature", 0, 100)
    return None if value is None else 0.0 if value < 0.001 else value


def _seed(fields: Fields) -> int | None:
    """OpenAI's seeds have 64 bits and a sign; ours are 32 bits wide. -1 is llama-server's word for any."""
    value = fields.whole("seed", -(2**63), 2**64 - 1)
    return None if value is None or value == -1 else value % (_MAX_SEED + 1)


def _logit_bias(fields: Fields) -> dict[str, float] | None:
    value = fields.object("logit_bias")
    raw = fields.raw("logit_bias")
    if value is None or not raw:
        return None
    if len(raw) > 1024 or not all(str(key).isascii() and str(key).isdigit() and len(str(key)) < 10 for key in raw):
        raise InvalidRequest("logit_bias names no token ids", "Give at most 1024 token ids with a bias each.",
                             "logit_bias")
    return {key: value.number(key, -100, 100) or 0.0 for key in raw}


def read_message(value: Any, where: str) -> dict[str, Any]:
    """One message, its text joined from parts, in the shape that templates know. Raises InvalidRequest."""
    fields = Fields(value, where)
    role = fields.choice("role", _ROLES, "")
    if not role:
        raise fields.wrong("role", f"one of {', '.join(_ROLES)}")
    message: dict[str, Any] = {"role": {"developer": "system", "function": "tool"}.get(role, role),
                               "content": _content(fields)}
    calls = [_tool_call(one, f"{where}.tool_calls[{i}]")
             for i, one in enumerate(fields.items("tool_calls", _MAX_TOOLS))]
    if calls:
        message["tool_calls"] = calls
    elif not fields.has("content"):
        raise fields.wrong("content", "a text")
    for key in ("name", "tool_call_id"):
        if fields.has(key):
            message[key] = fields.required_text(key, 256)
    return message


def _content(fields: Fields) -> str:
    value = fields.raw("content")
    if not isinstance(value, list):
        return fields.text("content", "") or ""
    parts = []
    for index, one in enumerate(fields.items("content", MAX_MESSAGES)):
        part = Fields(one, fields.name(f"content[{index}]"))
        if part.text("type", "text") not in ("text", "refusal"):
            raise part.wrong("type", "text: the models here read nothing else")
        parts.append(part.text("text") or part.text("refusal") or "")
    return "".join(parts)


def _tool_call(value: Any, where: str) -> dict[str, Any]:
    function = Fields(value, where).object("function")
    if function is None:
        raise InvalidRequest(f"{where}.function is missing", "Give the function's name and arguments.", where)
    arguments: Any = function.raw("arguments")
    if isinstance(arguments, str):  # OpenAI's form; templates want the value
        check_text(arguments, function.name("arguments"))
        with suppress(ValueError, RecursionError):  # a model's unfinished call, which it may see again as it was
            arguments = json.loads(arguments) if arguments.strip() else {}
    return {"type": "function", "function": {"name": function.required_text("name", 256), "arguments": arguments}}


def _response_format(fields: Fields) -> tuple[Mapping[str, Any] | None, str | None]:
    wanted, grammar = fields.object("response_format"), fields.text("grammar", None, 2**20) or None
    if wanted is None:
        return None, grammar
    kind = wanted.choice("type", ("text", "json_object", "json_schema"), "text")
    if kind == "text":
        return None, grammar
    if grammar is not None:
        raise InvalidRequest("grammar and response_format exclude each other", "Send one of them.", "grammar")
    if kind == "json_object":
        return {"type": "object"}, None
    inner = wanted.object("json_schema")
    schema = inner.raw("schema") if inner is not None else None
    if inner is None or not isinstance(schema, Mapping):
        raise InvalidRequest("response_format.json_schema.schema is missing", "Give the JSON schema of the answer.",
                             "response_format")
    return schema, None


def read_tools(fields: Fields) -> ToolChoice | None:
    functions = []
    for index, one in enumerate(fields.items("tools", _MAX_TOOLS)):
        tool = Fields(one, f"tools[{index}]")
        tool.choice("type", ("function",), "function")
        function = tool.object("function")
        if function is None:
            raise tool.wrong("function", "a name, a description and parameters")
        parameters = function.raw("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise function.wrong("parameters", "a JSON schema")
        functions.append({"name": function.required_text("name", _MAX_NAME_CHARS),
                          "description": function.text("description", "", 2**16), "parameters": parameters})
    choice = fields.raw("tool_choice")
    if not functions:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools", "Send the functions in tools.", "tool_choice")
        return None
    names = [str(function["name"]) for function in functions]
    if len(set(names)) < len(names):
        raise InvalidRequest("two of the tools have the same name", "Give each a name of its own.", "tools")
    if isinstance(choice, Mapping):
        named = Fields(choice, "tool_choice").object("function")
        name = named.required_text("name", _MAX_NAME_CHARS) if named is not None else ""
        if name not in names:
            raise fields.wrong("tool_choice", f"one of the tools: {', '.join(names)}")
        return ToolChoice(tuple(functions), "required", name)
    match fields.choice("tool_choice", ("none", "auto", "required"), "auto"):
        case "none":
            return ToolChoice(tuple(functions), "none")
        case "required":
            return ToolChoice(tuple(functions), "required")
    return ToolChoice(tuple(functions), "auto")


def _prompt(fields: Fields) -> str | tuple[int, ...]:
    prompt = fields.raw("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return check_text(prompt, "prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(one, int) and 0 <= one < 2**31 for one in prompt):
        return tuple(prompt)
    raise InvalidRequest("prompt is no text", "Give one text, or one list of token ids.", "prompt")


def read_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    stops = [value] if isinstance(value, str) else fields.items("stop", MAX_STOPS)
    if not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP_CHARS for one in stops):
        raise fields.wrong("stop", f"texts of 1 to {MAX_STOP_CHARS} characters")
    return tuple(check_text(one, "stop") for one in stops)


def _form(fields: Fields) -> Form:
    options = fields.object("stream_options")
    return Form(fields.flag("stream"), options is not None and options.flag("include_usage"),
                fields.flag("return_progress"))


def _model(fields: Fields) -> str | None:
    return fields.text("model", None, 4096) or None


def _refuse(fields: Fields) -> None:
    for name in _REFUSED:
        if fields.has(name):
            raise InvalidRequest(f"{name} is not supported", "Leave it out.", name)
    for name in ("n", "best_of"):
        if (fields.whole(name, 1, 128) or 1) != 1:
            raise InvalidRequest(f"{name} above 1 is not supported", "Send the request several times.", name)
