"""Rewrites rules so that equal texts are written equally, without changing what they match.

Needed because llguidance 1.9 fails on alternatives that are one text in two forms, such as `"b" "bb" | "bbb"`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from edgert.text.constraint_gbnf import Alt, Chars, Node, Ref, Repeat, Rules, Seq, Text

_EMPTY = Seq(())
_MAX_TEXT_CHARS = 1024  # texts that grow by reference (x ::= y y) are not joined beyond


def simplify(rules: Rules, regular: Iterable[str]) -> Rules:
    """`regular` are the rules without recursion, each after those it refers to; literal ones vanish into the rest."""
    done: dict[str, Node] = {}
    for name in regular:
        done[name] = _simplified(rules[name], done)
    return {name: done[name] if name in done else _simplified(node, done) for name, node in rules.items()}


def _simplified(node: Node, done: Mapping[str, Node]) -> Node:
    match node:
        case Ref(name):
            found = done.get(name, node)
            return found if found == _EMPTY or isinstance(found, Ref | Text) else node
        case Chars(((low, high),)) if low == high:
            return Text(chr(low))
        case Chars() | Text():
            return node
        case Seq(parts):
            flat = list(_joined(part for one in parts for part in _parts(_simplified(one, done))))
            return flat[0] if len(flat) == 1 else Seq(tuple(flat))
        case Alt(options):
            simple = dict.fromkeys(option for one in options for option in _options(_simplified(one, done)))
            return next(iter(simple)) if len(simple) == 1 else Alt(tuple(simple))
        case Repeat(inner, least, most):
            simple_inner = _simplified(inner, done)
            if most == 0 or simple_inner == _EMPTY:
                return _EMPTY
            if isinstance(simple_inner, Text) and least == most and least * len(simple_inner.text) <= _MAX_TEXT_CHARS:
                return Text(simple_inner.text * least)
            return simple_inner if (least, most) == (1, 1) else Repeat(simple_inner, least, most)


def _parts(node: Node) -> tuple[Node, ...]:
    return node.parts if isinstance(node, Seq) else (node,)


def _options(node: Node) -> tuple[Node, ...]:
    return node.options if isinstance(node, Alt) else (node,)


def _joined(parts: Iterable[Node]) -> Iterator[Node]:
    text = ""
    for part in parts:
        if isinstance(part, Text) and len(text) + len(part.text) <= _MAX_TEXT_CHARS:
            text += part.text
            continue
        if text:
            yield Text(text)
        text = part.text if isinstance(part, Text) else ""
        if not text:
            yield part
    if text:
        yield Text(text)
