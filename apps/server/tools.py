"""Functions that a model may call: how they are told to it, and how its call is held to their schemas.

The form is the one that Qwen and Hermes models are trained on, `<tool_call>{"name": ..., "arguments": ...}`, with the
file's own template where it knows that form and with a system message where it does not. Pure functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_INSTRUCTIONS = """\
You may call functions. These are their descriptions, one JSON object a line:
{functions}
To call one, answer with its name and arguments and nothing else, in this form:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""


def is_native(template: str) -> bool:
    """Whether a chat template tells functions by itself, in the form that is parsed here."""
    return "tools" in template and OPEN in template


def told(messages: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that knows no functions: all of it in words."""
    instructions = _INSTRUCTIONS.format(functions="\n".join(map(json.dumps, functions))) if functions else ""
    plain = [_in_words(message) for message in messages]
    if not instructions:
        return plain
    if plain and plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{instructions}"}, *plain[1:]]
    return [{"role": "system", "content": instructions}, *plain]


def _in_words(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [f"{OPEN}\n{json.dumps(call['function'])}\n{CLOSE}" for call in message.get("tool_calls", ())]
    content = "\n".join(part for part in (message["content"], *calls) if part)
    return {"role": message["role"], "content": content}


def call_schema(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of any of `functions`."""
    return {"anyOf": [_one_call(function, f"#/anyOf/{index}/properties/arguments")
                      for index, function in enumerate(functions)]}


def _one_call(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": ["name", "arguments"],
            "properties": {"name": {"const": function["name"]},
                           "arguments": _moved(arguments_schema(function), where)}}


def arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of one function's arguments; an object where it says nothing."""
    parameters = function.get("parameters")
    return dict(parameters) if parameters else {"type": "object", "properties": {}, "additionalProperties": False}


def _moved(schema: Any, where: str) -> Any:
    """`schema` with its own references following it to `where`."""
    if isinstance(schema, list):
        return [_moved(one, where) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: where + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, where) for key, value in schema.items()}


def call_prefix(name: str) -> str:
    """What comes before the arguments in a call of `name`."""
    return f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": '


def parse_call(text: str) -> tuple[str, str] | None:
    """The name and the arguments (JSON text) of a call; None where the text is cut off."""
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    return call["name"], json.dumps(call.get("arguments", {}))
