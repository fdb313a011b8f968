"""A model's chat template: messages in, prompt text out.

Templates come with model files and are hostile until proven otherwise: they run in a sandbox that bounds what they
touch, make and take (template_sandbox.py). Knows messages; does not know tokens, nor which file has which template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from edgert.errors import TemplateError, UsageError
from edgert.text.template_bounds import MAX_DEPTH, MAX_SOURCE_CHARS, BoundsExceeded

_MAX_PROBLEM_CHARS = 300


class Message(TypedDict):
    """One turn of a conversation. A template may know more keys; others are passed on to it as they are."""

    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


class ChatTemplate:
    """A compiled template. May render from several threads at once."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str, path: str) -> None:
        """Compile `source`; `path` is the file to name in errors. Raises TemplateError."""
        self._path = path
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(path, f"it has {len(source)} characters; at most {MAX_SOURCE_CHARS} are accepted")
        from edgert.text.template_sandbox import BoundedEnvironment

        try:
            self._template = BoundedEnvironment().from_string(source)
        except Exception as error:  # whatever Jinja and Python say to a hostile text
            raise TemplateError(path, _problem(error)) from error

    def render(self, messages: Sequence[Message | Mapping[str, object]], *, add_generation_prompt: bool = True,
               tools: Sequence[Mapping[str, object]] | None = None, **extra: object) -> str:
        """The prompt of a conversation; `extra` are further variables of the template (`enable_thinking`, ...).

        Variables are plain data (texts, numbers, lists, mappings). Raises TemplateError when the template fails or
        exceeds its bounds (4 Mi characters, 64 MiB of intermediate texts, 2 s), UsageError for other variables.
        """
        from edgert.text.template_sandbox import render

        variables: dict[str, object] = {**self._tokens, "add_generation_prompt": add_generation_prompt}
        for name, value in {"messages": list(messages), "tools": tools, **extra}.items():
            variables[name] = _plain(value, name)
        try:
            return render(self._template, variables)
        except Exception as error:  # a template can provoke any of Python's errors
            raise TemplateError(self._path, _problem(error)) from error


def _plain(value: object, name: str, depth: int = 0) -> object:
    """A copy of `value` in Python's own types: templates call methods, and no other object's."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if depth < MAX_DEPTH:
        if isinstance(value, Mapping):
            return {str(key): _plain(part, name, depth + 1) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [_plain(part, name, depth + 1) for part in value]
    raise UsageError(f"the template variable {name!r} holds a {type(value).__name__}",
                     "Use texts, numbers, lists and mappings, not too deep.")


def _problem(error: Exception) -> str:
    said = "".join(filter(str.isprintable, str(error)[:_MAX_PROBLEM_CHARS]))
    if isinstance(error, BoundsExceeded):
        return said
    line = getattr(error, "lineno", None)
    return f"{type(error).__name__}{f' in line {line}' if line else ''}: {said}"
