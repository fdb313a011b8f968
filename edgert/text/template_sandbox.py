"""Jinja as chat templates use it, closed in: no operator, call, filter or loop exceeds template_bounds.py.

Builds on Jinja's immutable sandbox, which guards attributes but neither time nor memory. Before a template is
compiled its tree is rewritten so that loops count their steps and literals, slices, comparisons and joined texts are
measured; operators, calls, filters and tests pass through the environment anyway. A rendering therefore ends in time
without a thread: every step that can be repeated asks the meter. Imported only when used (Jinja takes 60 ms).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from edgert.text.template_bounds import (
    MAX_INT_BITS,
    MAX_PADDING,
    MAX_TEXT_CHARS,
    MAX_VALUES,
    BoundsExceeded,
    Meter,
    as_text,
    measure,
    require_room,
    require_room_for,
)
from edgert.text.template_filters import FILTERS, METER, TESTS, counted_filter, counted_steps, counted_test, meter_of
from edgert.text.template_methods import bounded_format, check_printf, checked_arguments

# Filters that only the rewritten tree names: no template can write a name with a space.
_STEP, _STEPS, _HOLD, _JOIN = "one step", "count steps", "hold", "join texts"
_MAX_DATE_FORMAT_CHARS = 256
_INTERNAL_ARGUMENTS = frozenset({"_loop_vars", "_block_vars"})  # Jinja's own, passed along with calls


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model says, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _OpaqueNamespace(Namespace):
    """Printing it does not print what it holds: namespaces that hold each other would print for ever."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__(_make_dict(*args, **kwargs))

    def __repr__(self) -> str:
        return "<Namespace>"


class _Measured(NodeTransformer):
    """Rewrites a template's tree so that everything that takes room or time asks the meter."""

    def _through(self, name: str, node: nodes.Expr | None, lineno: int) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._through(_STEPS, node.iter, node.lineno)  # type: ignore[arg-type]  # declared as Node
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._through(_JOIN, nodes.Tuple(node.nodes, "load", lineno=node.lineno), node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._through(_STEP, node.expr, node.lineno)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._through(_HOLD, node, node.lineno) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._through(_HOLD, node, node.lineno)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._through(_HOLD, node, node.lineno) if node.ctx == "load" else node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = node.filter or self._through(_HOLD, None, node.lineno)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # unlike template data, constants are finalized

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        raise jinja2.TemplateSyntaxError(f"{type(node).__name__} is not available in chat templates", node.lineno)

    visit_EvalContextModifier = visit_ScopedEvalContextModifier = _refuse
    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates that keep within bounds. Rendering needs the variable METER."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        # Not optimized: the optimizer evaluates constant filters while it compiles, without a meter.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_finalize, cache_size=0,
                         extensions=[_Generation, jinja2.ext.loopcontrols])
        self.filters = {_STEP: _step, _STEPS: _steps, _HOLD: _hold, _JOIN: _join_texts}
        self.filters |= {name: counted_filter(name, function) for name, function in FILTERS.items()}
        self.tests = {name: counted_test(function) for name, function in TESTS.items()}
        self.globals.pop("lipsum")
        self.globals |= {"dict": _make_dict, "namespace": _OpaqueNamespace, "raise_exception": _raise_exception,
                         "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Measured().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter = meter_of(context)
        n_values, _ = measure(args, {key: value for key, value in kwargs.items() if key not in _INTERNAL_ARGUMENTS})
        meter.spend(8 * n_values)
        owner = obj.__self__ if isinstance(obj, types.BuiltinMethodType) else None
        if owner is not None:
            args = checked_arguments(owner, obj.__name__, args, kwargs)
        return meter.hold(super().call(context, obj, *args, **kwargs), new_texts=isinstance(owner, str))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatting = super().wrap_str_format(value)
        return formatting and bounded_format(value.__self__, formatting)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "+" and isinstance(left, str):
            require_room_for(left, right)
        elif operator == "%" and isinstance(left, str):
            check_printf(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
        return meter_of(context).hold(super().call_binop(context, operator, left, right))


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
            n_values, n_chars = measure(sequence)
            require_room(times * n_chars)
            if not isinstance(sequence, str) and times * n_values > MAX_VALUES:
                raise BoundsExceeded(f"it makes a list of more than {MAX_VALUES} values")


def _check_bits(n_bits: int) -> None:
    if n_bits > MAX_INT_BITS:
        raise BoundsExceeded(f"it makes a number of {n_bits} bits")


@pass_context
def _finalize(context: Context, value: object) -> str:
    """What is put out, counted. Everything passes here: literal text, expressions, and what macros collect."""
    return str(meter_of(context).hold(as_text(value)))


@pass_context
def _step(context: Context, value: object) -> object:
    meter_of(context).spend()
    return value


@pass_context
def _steps(context: Context, values: Iterable[object]) -> Iterator[object]:
    return counted_steps(meter_of(context), values)


@pass_context
def _hold(context: Context, value: object) -> object:
    return meter_of(context).hold(value)


@pass_context
def _join_texts(context: Context, values: tuple[object, ...]) -> object:
    texts = [as_text(value) for value in values]
    require_room(sum(map(len, texts)))
    return meter_of(context).hold("".join(texts))


def _make_dict(pairs: Iterable[Any] = (), **named: object) -> dict[Any, Any]:
    entries = list(pairs.items() if isinstance(pairs, dict) else pairs)
    if len(entries) > MAX_PADDING:  # numbers as keys can be chosen so that all their hashes collide
        raise BoundsExceeded(f"it makes a mapping of more than {MAX_PADDING} keys")
    return dict(entries, **named)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(date_format: str) -> str:
    if len(date_format) > _MAX_DATE_FORMAT_CHARS:
        raise BoundsExceeded(f"it formats a date with {len(date_format)} characters")
    return datetime.now().strftime(date_format)


def render(template: jinja2.Template, variables: dict[str, object]) -> str:
    """What `template` makes of `variables`, with a meter of its own."""
    text = template.render({**variables, METER: Meter()})
    if len(text) > MAX_TEXT_CHARS:
        raise BoundsExceeded(f"it makes a prompt of {len(text)} characters")
    return text
