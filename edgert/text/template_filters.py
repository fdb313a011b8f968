"""The filters and tests of chat templates, each with the check that keeps its result within bounds.

Those of Jinja's that no chat template needs (center, wordwrap, urlize, xmlattr, random and others) are left out: a
template that names one does not compile. Nothing becomes Markup: chat templates escape nothing by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import markupsafe
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.tests import TESTS as JINJA_TESTS
from jinja2.utils import pass_context

from edgert.text.template_bounds import (
    MAX_DEPTH,
    MAX_PADDING,
    MAX_VALUES,
    BoundsExceeded,
    Meter,
    as_text,
    measure,
    require_room,
    require_room_for,
)
from edgert.text.template_methods import check_printf, check_replace

METER = "the meter"  # a variable of the rendering; no template can write a name with a space
_MAX_ROUNDING = 64
_MAX_INDENT = 16
_MAX_SEPARATOR_CHARS = 16

_Rule = Callable[[Any, Sequence[Any]], None]


def meter_of(context: Context) -> Meter:
    meter = context.resolve_or_missing(METER)
    if not isinstance(meter, Meter):
        raise BoundsExceeded("it is rendered without a meter")
    return meter


def counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a filter that checks what it is given and counts what it gives."""
    lead, rule = _lead(function), _RULES.get(name)

    @pass_context
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = meter_of(context)
        if isinstance(value, str) and name not in _TAKE_LONG_TEXTS and len(value) > MAX_VALUES:
            raise BoundsExceeded(f"it applies {name!r} to a text of {len(value)} characters")
        if rule is not None:
            rule(value, (*args, *kwargs.values()))
        if name == "unique":  # numbers can be chosen so that all their hashes collide
            value = counted_steps(meter, value)
        result = function(*lead(context), value, *args, **kwargs)
        return counted_steps(meter, result) if isinstance(result, Iterator) else meter.hold(result)

    return counted


def counted_steps(meter: Meter, values: Iterable[Any]) -> Iterator[Any]:
    """`values`, each counted as a step."""
    for value in values:
        meter.spend()
        yield value


def counted_test(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a test that counts as a step."""
    lead = _lead(function)

    @pass_context
    def counted(context: Context, *args: Any, **kwargs: Any) -> Any:
        meter_of(context).spend()
        return function(*lead(context), *args, **kwargs)

    return counted


def _lead(function: Callable[..., Any]) -> Callable[[Context], tuple[Any, ...]]:
    """What Jinja passes to `function` before the value, by the mark that its decorators leave."""
    mark = getattr(getattr(function, "jinja_pass_arg", None), "name", None)
    leads: dict[str | None, Callable[[Context], tuple[Any, ...]]] = {
        "context": lambda context: (context,),
        "eval_context": lambda context: (context.eval_ctx,),
        "environment": lambda context: (context.environment,),
        None: lambda _: (),
    }
    return leads[mark]


@pass_context
def _join(context: Context, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    get = make_attrgetter(context.environment, attribute) if attribute is not None else None
    texts: list[str] = []
    n_chars = 0
    for item in value:
        texts.append(as_text(item if get is None else get(item)))
        n_chars += len(texts[-1]) + len(d)
        require_room(n_chars)
    return str(d).join(texts)


def _escape(value: object) -> str:
    return str(markupsafe.escape(as_text(value)))


def _tojson(value: object, ensure_ascii: bool = False, indent: int | str | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """As Hugging Face's chat templates have it: plain JSON, nothing escaped for HTML."""
    width = len(indent) if isinstance(indent, str) else indent or 0
    if width > _MAX_INDENT or len("".join(separators or ())) > _MAX_SEPARATOR_CHARS:
        raise BoundsExceeded("it indents or separates JSON too widely")
    n_values, _ = measure(value)
    require_room_for(value, beside=n_values * width * MAX_DEPTH)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_padding(value: Any, arguments: Sequence[Any]) -> None:
    if any(isinstance(one, int) and one > MAX_PADDING for one in arguments):
        raise BoundsExceeded(f"it makes lists or columns of more than {MAX_PADDING}")


def _check_indent(value: Any, arguments: Sequence[Any]) -> None:
    width = max((one if isinstance(one, int) else len(one) for one in arguments), default=4)
    text = as_text(value)
    require_room(len(text) + (len(text.splitlines()) + 1) * width)


def _check_rounding(value: Any, arguments: Sequence[Any]) -> None:
    if any(isinstance(one, int) and abs(one) > _MAX_ROUNDING for one in arguments):
        raise BoundsExceeded(f"it rounds to more than {_MAX_ROUNDING} digits")


def _check_sum(value: Any, arguments: Sequence[Any]) -> None:
    if any(isinstance(one, (list, tuple)) for one in arguments):
        raise BoundsExceeded("it sums lists")


def _check_replace(value: Any, arguments: Sequence[Any]) -> None:
    check_replace(as_text(value), as_text(arguments[0]), as_text(arguments[1]))


def _check_format(value: Any, arguments: Sequence[Any]) -> None:
    check_printf(as_text(value), tuple(arguments))


_RULES: Mapping[str, _Rule] = {
    "batch": _check_padding, "slice": _check_padding, "indent": _check_indent, "round": _check_rounding,
    "sum": _check_sum, "replace": _check_replace, "format": _check_format,
}
# Filters that work in one pass in C, and fast. Others see at most MAX_VALUES characters as items or words.
_TAKE_LONG_TEXTS = frozenset({
    "capitalize", "count", "d", "default", "e", "escape", "first", "float", "format", "indent", "int", "last",
    "length", "lower", "replace", "safe", "string", "tojson", "trim", "truncate", "upper",
})
_OWN: Mapping[str, Callable[..., Any]] = {
    "join": _join, "tojson": _tojson, "string": as_text, "safe": as_text, "e": _escape, "escape": _escape,
}
_FROM_JINJA = (
    "abs", "batch", "capitalize", "count", "d", "default", "dictsort", "first", "float", "format", "groupby", "indent",
    "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "round", "select", "selectattr", "slice", "sort", "sum", "title", "trim", "truncate", "unique", "upper",
    "urlencode", "wordcount",
)
FILTERS: Mapping[str, Callable[..., Any]] = {**{name: JINJA_FILTERS[name] for name in _FROM_JINJA}, **_OWN}
TESTS: Mapping[str, Any] = JINJA_TESTS
