"""Reads GBNF, llama.cpp's notation of grammars, into rules. The text is taken for hostile and everything is bounded.

Knows the notation as llama.cpp's parser has it, without token references (`<...>`). Does not know how a grammar is
matched (constraint_lexemes.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from edgert.errors import GrammarError

MAX_GRAMMAR_BYTES = 256 * 2**10  # grammars made from large JSON schemas have 100 KiB
MAX_NESTING = 64  # parentheses; bounds the recursion here and in everything that walks the tree
MAX_RULES = 2000
MAX_REPEAT = 2000  # llama.cpp's own bound; it takes larger upper limits for "any number"
MAX_CODE_POINT = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_LINE_END = re.compile(r"\r\n?|\n|\Z")
_BOUNDS = re.compile(r"\{\s*(\d{1,9})\s*(?:(,)\s*(\d{1,9})?\s*)?\}")
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_REPEATS: Mapping[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of `ranges`: code points, sorted, disjoint, both ends included, no surrogates."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """These characters, one after the other."""

    text: str


@dataclass(frozen=True, slots=True)
class Seq:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`node` from `least` to `most` times; None is any number."""

    node: Node
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Ref:
    """Another rule."""

    name: str


Node = Chars | Text | Seq | Alt | Repeat | Ref
Rules = Mapping[str, Node]


def parse_gbnf(text: str) -> Rules:
    """The rules of a grammar by name, `root` among them. Raises GrammarError with the line and column."""
    size_bytes = len(text.encode("utf-8", errors="surrogatepass"))
    if size_bytes > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"the grammar has {size_bytes} bytes", f"At most {MAX_GRAMMAR_BYTES} are possible.")
    return _Parser(text).rules()


class _Parser:
    """Recursive descent over one text; the recursion is as deep as the parentheses."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._references: dict[str, int] = {}  # where each name is used first

    def rules(self) -> Rules:
        rules: dict[str, Node] = {}
        self._skip(_SPACE_AND_LINES)
        while self._at < len(self._text):
            start, name = self._at, self._name()
            if name in rules:
                raise self._error(f"rule {name!r} is there twice", start)
            if len(rules) == MAX_RULES:
                raise self._error(f"there are more than {MAX_RULES} rules", start)
            self._skip(_SPACE)
            self._expect("::=")
            self._skip(_SPACE_AND_LINES)
            rules[name] = self._alternatives(0)
            if _LINE_END.match(self._text, self._at) is None:
                raise self._error("a rule must end here, with its line")
            self._skip(_SPACE_AND_LINES)
        for name, at in self._references.items():
            if name not in rules:
                raise self._error(f"rule {name!r} is not defined", at)
        if "root" not in rules:
            raise GrammarError("the grammar has no rule root", "Add one: root ::= ...")
        return rules

    def _alternatives(self, depth: int) -> Node:
        options = [self._sequence(depth)]
        while self._peek() == "|":
            self._at += 1
            self._skip(_SPACE_AND_LINES)
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else Alt(tuple(options))

    def _sequence(self, depth: int) -> Node:
        space = _SPACE_AND_LINES if depth else _SPACE
        parts: list[Node] = []
        while (node := self._item(depth)) is not None:
            self._skip(space)
            if (bounds := self._bounds()) is not None:
                node = Repeat(node, *bounds)
                self._skip(space)
            parts.append(node)
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def _item(self, depth: int) -> Node | None:
        match self._peek():
            case '"':
                return self._literal()
            case "[":
                return self._char_class()
            case "(":
                return self._group(depth)
            case ".":
                self._at += 1
                return _chars([(0, MAX_CODE_POINT)])
            case "<" | "!":
                raise self._error("references to tokens are not supported")
            case "*" | "+" | "?" | "{":
                raise self._error("there is nothing to repeat")
        if _NAME.match(self._text, self._at) is None:
            return None
        start, name = self._at, self._name()
        self._references.setdefault(name, start)
        return Ref(name)

    def _group(self, depth: int) -> Node:
        if depth == MAX_NESTING:
            raise self._error(f"parentheses are nested more than {MAX_NESTING} deep")
        self._at += 1
        self._skip(_SPACE_AND_LINES)
        node = self._alternatives(depth + 1)
        self._expect(")")
        return node

    def _literal(self) -> Node:
        self._at += 1
        chars: list[str] = []
        while self._peek() != '"':
            chars.append(chr(self._code_point()))
        self._at += 1
        return Text("".join(chars)) if chars else Seq(())

    def _char_class(self) -> Chars:
        start = self._at
        self._at += 1
        inverted = self._peek() == "^"
        self._at += inverted
        ranges: list[tuple[int, int]] = []
        while self._peek() != "]":
            at, low = self._at, self._code_point()
            high = low
            if self._peek() == "-" and self._text[self._at + 1:self._at + 2] != "]":
                self._at += 1
                high = self._code_point()
            if high < low:
                raise self._error("the range ends before it begins", at)
            ranges.append((low, high))
        self._at += 1
        chars = _chars(_inverse(ranges) if inverted else ranges)
        if not ranges or not chars.ranges:
            raise self._error("no character is in this class", start)
        return chars

    def _code_point(self) -> int:
        start, char = self._at, self._peek()
        if char == "":
            raise self._error("the grammar ends inside quotes or brackets")
        self._at += 1
        if char != "\\":
            code_point = ord(char)
        else:
            kind = self._peek()
            self._at += 1
            if kind in _HEX_DIGITS:
                code_point = self._hex(_HEX_DIGITS[kind])
            elif kind in _ESCAPES:
                code_point = ord(_ESCAPES[kind])
            else:
                raise self._error(f"there is no escape \\{kind}", start)
        if code_point > MAX_CODE_POINT or _SURROGATES[0] <= code_point <= _SURROGATES[1]:
            raise self._error(f"{code_point:#x} is not a character", start)
        return code_point

    def _hex(self, n_digits: int) -> int:
        digits = self._text[self._at:self._at + n_digits]
        if re.fullmatch(f"[0-9a-fA-F]{{{n_digits}}}", digits) is None:
            raise self._error(f"{n_digits} hexadecimal digits belong here")
        self._at += n_digits
        return int(digits, 16)

    def _bounds(self) -> tuple[int, int | None] | None:
        simple = _REPEATS.get(self._peek())
        if simple is not None:
            self._at += 1
            return simple
        if self._peek() != "{":
            return None
        match = _BOUNDS.match(self._text, self._at)
        if match is None:
            raise self._error("write {n}, {n,} or {n,m}")
        least = int(match[1])
        most = least if match[2] is None else int(match[3]) if match[3] else None
        if max(least, most or 0) > MAX_REPEAT:
            raise self._error(f"more than {MAX_REPEAT} repetitions ({{n,}} has no upper limit)")
        if most is not None and most < least:
            raise self._error(f"at least {least} and at most {most} repetitions are impossible")
        self._at = match.end()
        return least, most

    def _name(self) -> str:
        match = _NAME.match(self._text, self._at)
        if match is None:
            raise self._error("a rule's name belongs here")
        self._at = match.end()
        return match[0]

    def _peek(self) -> str:
        return self._text[self._at:self._at + 1]

    def _skip(self, space: re.Pattern[str]) -> None:
        match = space.match(self._text, self._at)
        assert match is not None  # both patterns match an empty text
        self._at = match.end()

    def _expect(self, what: str) -> None:
        if not self._text.startswith(what, self._at):
            raise self._error(f"{what!r} belongs here")
        self._at += len(what)

    def _error(self, problem: str, at: int | None = None) -> GrammarError:
        at = min(self._at if at is None else at, len(self._text))
        line = self._text.count("\n", 0, at) + 1
        column = at - (self._text.rfind("\n", 0, at) + 1) + 1
        near = repr(self._text[at:at + 20]) if at < len(self._text) else "the end"
        return GrammarError(f"grammar, line {line}, column {column}: {problem}",
                            f"Correct the grammar at {near}; it is read as llama.cpp reads GBNF.")


def _chars(ranges: list[tuple[int, int]]) -> Chars:
    """Sorted, joined where they touch, and without surrogates, which no UTF-8 text has."""
    before, behind = _SURROGATES[0] - 1, _SURROGATES[1] + 1
    parts = [part for low, high in ranges for part in ((low, min(high, before)), (max(low, behind), high))]
    merged: list[tuple[int, int]] = []
    for low, high in sorted(part for part in parts if part[0] <= part[1]):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return Chars(tuple(merged))


def _inverse(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    ends = [(-1, -1), *_chars(ranges).ranges, (MAX_CODE_POINT + 1, MAX_CODE_POINT + 1)]
    return [(before[1] + 1, after[0] - 1) for before, after in pairwise(ends) if before[1] + 1 < after[0]]
