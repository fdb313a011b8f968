"""Reads a JSON schema for constrained output: what it may ask for, and how large it may be.

llguidance compiles it, and ignores keywords that it does not know; so every keyword is looked at here, and what
would not be enforced is refused by name. The order of properties is the schema's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import unquote

from edgert.errors import GrammarError
from edgert.text.constraint_lark import HEADER

MAX_SCHEMA_BYTES = 256 * 2**10
MAX_NESTING = 64  # of brackets; the parsers behind this recurse
MAX_PROPERTIES = 1000  # with the names in required; llguidance's time grows with the square (5000: 4 s)
MAX_VALUES = 10_000  # of all enumerations together
MAX_EXACT = 2**53  # llguidance computes with float64: beyond, whole numbers become others
MIN_EXACT = 1e-15  # smaller fractions have more digits than it handles
MAX_MULTIPLE = 10_000  # multipleOf without its point; the automaton has as many states (1,000,000: 28 s, 390 MiB)
_MAX_PATH_CHARS, _MAX_SHOWN_CHARS = 200, 60  # of the schema in a message
# Between tokens of JSON: nothing, a space, or a new line and its indent. Unbounded white space, which JSON allows,
# lets a small model write new lines for ever.
_WHITESPACE = r" |\n[ \t]{0,40}"

_IN_ONE = frozenset({"items", "additionalItems", "additionalProperties"})
_IN_LIST = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_IN_MAP = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_PLAIN = frozenset({"type", "required", "minItems", "maxItems", "minProperties", "maxProperties", "minLength",
                    "maxLength", "pattern"})
_ANNOTATIONS = frozenset({"$comment", "title", "description", "default", "examples", "example", "deprecated",
                          "readOnly", "writeOnly", "contentMediaType", "contentEncoding", "contentSchema",
                          "discriminator"})
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
_DRAFTS = ("draft-04/schema", "draft-06/schema", "draft-07/schema", "draft/2019-09/schema", "draft/2020-12/schema")
_SUPPORTED = ("Supported are type, enum, const, properties, required, additionalProperties, items, anyOf, allOf, "
              "oneOf, $ref, the bounds of numbers, strings, arrays and objects, pattern, and format.")


def schema_to_llguidance(schema: str | Mapping[str, Any] | bool) -> str:
    """The grammar of the JSON texts that `schema` (its text, or what it means) allows. Raises GrammarError."""
    text = schema if isinstance(schema, str) else _written(schema)
    size_bytes = len(text.encode("utf-8", errors="surrogatepass"))
    if size_bytes > MAX_SCHEMA_BYTES:
        raise GrammarError(f"the JSON schema has {size_bytes} bytes", f"At most {MAX_SCHEMA_BYTES} are possible.")
    _check_nesting(text)
    try:
        parsed = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except ValueError as error:
        raise GrammarError(f"the schema is not JSON: {error}", "Give a JSON object.") from error
    if parsed is True:
        parsed = {}
    if not isinstance(parsed, dict):
        raise GrammarError("the schema is not a JSON object", "Give an object such as {\"type\": \"object\"}.")
    _Check(parsed).run()
    return f"{HEADER}start: %json {json.dumps(parsed | {'x-guidance': {'whitespace_pattern': _WHITESPACE}})}\n"


def _written(schema: Mapping[str, Any] | bool) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the schema cannot be written as JSON: {error}", "Give a dict of plain values.") from error


def _check_nesting(text: str) -> None:
    """Before any parser sees it, for they recurse."""
    depth, in_string, escaped = 0, False, False
    for char in text:
        if in_string:
            in_string, escaped = escaped or char != '"', not escaped and char == "\\"
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            if depth > MAX_NESTING:
                raise GrammarError(f"the schema is nested more than {MAX_NESTING} deep", "Use $ref to make it flatter.")
        elif char in "]}":
            depth -= 1


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise GrammarError(f"the schema has {_shown(name)} twice in one object", "Remove one of them.")
        result[name] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


class _Check:
    """Walks over every schema in a schema, without recursion, and over everything that a $ref points to."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._pending: list[tuple[str, Any]] = [("#", root)]
        self._followed: set[str] = set()
        self._n_properties = self._n_values = 0

    def run(self) -> None:
        while self._pending:
            where, schema = self._pending.pop()
            if isinstance(schema, bool):
                continue
            if not isinstance(schema, dict):
                raise _refused(where, f"{_shown(schema)} is not a schema", "A schema is an object, true or false.")
            for keyword, value in schema.items():
                self._keyword(where, schema, keyword, value)

    def _keyword(self, where: str, schema: dict[str, Any], keyword: str, value: Any) -> None:
        path = _below(where, keyword)
        if keyword in _IN_MAP:
            self._add_map(path, value, counts=keyword not in {"$defs", "definitions"})
        elif keyword in _IN_LIST or (keyword == "items" and isinstance(value, list)):
            self._add_list(path, value)
        elif keyword in _IN_ONE:
            self._pending.append((path, value))
        elif keyword in _NUMBERS:
            _check_number(path, value, keyword)
        elif keyword in ("enum", "const"):
            self._check_values(path, value)
        elif keyword == "$ref":
            self._follow(path, value)
        elif keyword == "format" and not (isinstance(value, str) and value in _FORMATS):
            raise _refused(path, f"{_shown(value)} is not supported",
                               f"Use pattern instead, or one of {', '.join(sorted(_FORMATS))}.")
        elif keyword == "required" and isinstance(value, list):
            self._count_properties(len(value))
        elif keyword == "minProperties":
            _check_min_properties(path, schema)
        elif not _is_harmless(where, keyword, value):
            raise _refused(where, f"the keyword {_shown(keyword)} is not supported", _SUPPORTED)

    def _add_map(self, path: str, value: Any, *, counts: bool) -> None:
        if not isinstance(value, dict):
            raise _refused(path, f"{_shown(value)} is not an object", "Give an object of schemas by name.")
        self._count_properties(counts * len(value))
        self._pending += [(_below(path, name), one) for name, one in value.items()]

    def _count_properties(self, n: int) -> None:
        self._n_properties += n
        if self._n_properties > MAX_PROPERTIES:
            raise GrammarError(f"the schema has more than {MAX_PROPERTIES} properties", "Ask for less at once.")

    def _add_list(self, path: str, value: Any) -> None:
        if not isinstance(value, list):
            raise _refused(path, f"{_shown(value)} is not a list", "Give a list of schemas.")
        self._pending += [(_below(path, str(index)), one) for index, one in enumerate(value)]

    def _check_values(self, path: str, value: Any) -> None:
        pending = [value]
        while pending:
            one = pending.pop()
            self._n_values += 1
            if self._n_values > MAX_VALUES:
                raise GrammarError(f"the schema lists more than {MAX_VALUES} values", "Use pattern, or ask for less.")
            if isinstance(one, dict):
                pending += one.values()
            elif isinstance(one, list):
                pending += one
            elif isinstance(one, int | float):
                _check_number(path, one, "")

    def _follow(self, path: str, reference: Any) -> None:
        if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
            raise _refused(path, f"{_shown(reference)} is not in this schema",
                               "Only references such as #/$defs/name are followed; put what it names into $defs.")
        if reference in self._followed:
            return
        self._followed.add(reference)
        target: Any = self._root
        for part in unquote(reference[2:]).split("/") if len(reference) > 1 else ():
            target = _child(target, part.replace("~1", "/").replace("~0", "~"))
            if target is None:
                raise _refused(path, f"there is no {_shown(reference)}", "Define what it refers to, or correct it.")
        self._pending.append((reference, target))


def _child(parent: Any, name: str) -> Any:
    if isinstance(parent, dict):
        return parent.get(name)
    return parent[int(name)] if isinstance(parent, list) and name.isdecimal() and int(name) < len(parent) else None


def _is_harmless(where: str, keyword: str, value: Any) -> bool:
    if keyword == "$schema":
        return isinstance(value, str) and value.rstrip("#").endswith(_DRAFTS)
    if keyword in {"$id", "id"}:  # elsewhere it changes what references mean
        return where == "#"
    return keyword in _PLAIN or keyword in _ANNOTATIONS or (keyword.startswith("x-") and keyword != "x-guidance") \
        or keyword == "format"


def _check_number(path: str, value: Any, keyword: str) -> None:
    if isinstance(value, bool):
        return  # a value of an enumeration, or the exclusiveMinimum of draft 4
    if not isinstance(value, int | float):
        raise _refused(path, f"{_shown(value)} is not a number", "Give a number.")
    if abs(value) > MAX_EXACT or 0 < abs(value) < MIN_EXACT:
        raise _refused(path, f"{_shown(value)} cannot be kept exactly",
                           f"Give 0, or a number from {MIN_EXACT:g} to {MAX_EXACT} (or its negative).")
    if keyword == "multipleOf" and not 0 < _without_point(value) <= MAX_MULTIPLE:
        raise _refused(path, f"{_shown(value)} is not possible",
                           f"Give a number above 0 with digits that, without the point, are at most {MAX_MULTIPLE}.")


def _without_point(value: float) -> int:
    from decimal import Decimal

    _, digits, exponent = Decimal(repr(value)).as_tuple()
    assert isinstance(exponent, int)  # infinities are refused before
    number = int("".join(map(str, digits))) * int(10 ** max(0, exponent))
    while exponent < 0 and number % 10 == 0 and number:
        number, exponent = number // 10, exponent + 1
    return -number if value < 0 else number


def _check_min_properties(path: str, schema: dict[str, Any]) -> None:
    """Two additional properties may get the same name, which JSON readers count as one."""
    value, required = schema["minProperties"], schema.get("required", [])
    if isinstance(value, int) and isinstance(required, list) and value > len(set(map(str, required))) + 1:
        raise _refused(path, f"{value} different names cannot be enforced",
                           "Name the properties in properties and required.")


def _below(path: str, name: str) -> str:
    return f"{path}/{name}"[-_MAX_PATH_CHARS:]


def _refused(path: str, problem: str, next_step: str) -> GrammarError:
    return GrammarError(f"schema, {json.dumps(path)}: {problem}", next_step)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."
