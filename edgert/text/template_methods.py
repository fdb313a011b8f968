"""Which methods of texts, lists and mappings a template may call, and what their results may measure.

An allow-list: methods that pad, repeat or make bytes without bound are checked or absent, whatever Python adds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgert.text.template_bounds import MAX_PADDING, MAX_VALUES, BoundsExceeded, require_room, require_room_for

# A width or precision of four digits or more, or one that is taken from the arguments.
_WIDE_PRINTF = re.compile(r"%[^%a-zA-Z]*?(?:\*|\d{4})")
_PRINTF_KEY = re.compile(r"\([^()]*\)")
_WIDE_FORMAT = re.compile(r"\{[^{}]*(?:\d{4}|\{)")
_WIDTH = 999  # the most that the patterns let through
_MAX_TAB = 64
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def checked_arguments(owner: object, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The positional arguments to call `owner.name` with (an iterator among them is used up and given as a list).

    Raises BoundsExceeded when the method is not available or would make too much.
    """
    allowed = next((names for kind, names in _METHODS.items() if isinstance(owner, kind)), frozenset[str]())
    if name not in allowed:
        raise BoundsExceeded(f"the method {name!r} of {type(owner).__name__} is not available")
    if not isinstance(owner, str):
        return args
    if name == "join" and args:
        texts = list(args[0])
        require_room(sum(map(len, texts)) + len(owner) * len(texts))
        return (texts, *args[1:])
    if (rule := _TEXT_RULES.get(name)) is not None:
        rule(owner, (*args, *kwargs.values()))
    return args


def check_replace(text: str, old: str, new: str) -> None:
    """Bound `text.replace(old, new)`."""
    require_room(len(text) + len(new) * (text.count(old) if old else len(text) + 1))


def check_printf(template: str, arguments: object) -> None:
    """Bound `template % arguments`."""
    if _WIDE_PRINTF.search(_PRINTF_KEY.sub("", template)):
        raise BoundsExceeded(f"it formats with a width of more than {_WIDTH}")
    n_places = template.count("%")
    require_room_for(arguments, times=n_places, beside=len(template) + n_places * _WIDTH)


def bounded_format(template: str, formatting: Callable[..., str]) -> Callable[..., str]:
    """`formatting`, which is `template.format` made safe by Jinja's sandbox, within bounds."""

    def bounded(*args: Any, **kwargs: Any) -> str:
        if _WIDE_FORMAT.search(template.replace("{{", "").replace("}}", "")):
            raise BoundsExceeded(f"it formats with a width of more than {_WIDTH}")
        n_places = template.count("{")
        require_room_for(args, kwargs, times=n_places, beside=len(template) + n_places * _WIDTH)
        return formatting(*args, **kwargs)

    return bounded


def _check_split(text: str, arguments: Sequence[Any]) -> None:
    separator = next((one for one in arguments if isinstance(one, str)), None)
    if (text.count(separator) if separator else len(text) // 2) >= MAX_VALUES:
        raise BoundsExceeded(f"it splits a text into more than {MAX_VALUES}")


def _check_lines(text: str, arguments: Sequence[Any]) -> None:
    if sum(text.count(end) for end in _LINE_ENDS) >= MAX_VALUES:
        raise BoundsExceeded(f"it splits a text into more than {MAX_VALUES} lines")


def _check_width(text: str, arguments: Sequence[Any]) -> None:
    if any(isinstance(one, int) and one > len(text) + MAX_PADDING for one in arguments):
        raise BoundsExceeded(f"it pads a text by more than {MAX_PADDING}")


def _check_tabs(text: str, arguments: Sequence[Any]) -> None:
    size = max((one for one in arguments if isinstance(one, int)), default=8)
    if size > _MAX_TAB:
        raise BoundsExceeded(f"it expands tabs to more than {_MAX_TAB}")
    require_room(len(text) + text.count("\t") * size)


def _check_replacing(text: str, arguments: Sequence[Any]) -> None:
    check_replace(text, str(arguments[0]), str(arguments[1]))


_TEXT_RULES: Mapping[str, Callable[[str, Sequence[Any]], None]] = {
    "split": _check_split, "rsplit": _check_split, "splitlines": _check_lines, "ljust": _check_width,
    "rjust": _check_width, "center": _check_width, "zfill": _check_width, "expandtabs": _check_tabs,
    "replace": _check_replacing,
}
_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset({
        *_TEXT_RULES, "join", "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha",
        "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper",
        "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "rstrip",
        "startswith", "strip", "swapcase", "title", "upper",
    }),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
}
