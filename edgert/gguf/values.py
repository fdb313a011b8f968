"""Metadata values: what a GGUF key may hold, and how it is read without believing the file.

Scalars, short texts and short numeric arrays become Python values; everything else (vocabularies, merges, whole
tokenizer files) stays in the file behind an `ArrayRef`. Knows the encoding, not what any key means.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType

from edgert.gguf.cursor import Cursor, open_cursor

# Per-layer settings have one number per layer; no model has 1,024 layers.
MAX_EAGER_ELEMENTS = 1024
# What parsed values of one file may take in memory, together. Real files need less than 100 KiB (a chat template
# of 30 KiB is long); whatever exceeds the rest of the allowance stays in the file as an ArrayRef.
_EAGER_ALLOWANCE_BYTES = 4 * 2**20
# Upper bounds of what CPython takes: a text character up to 4 bytes, an int or float in a tuple 8 + 32.
_TEXT_COST, _ELEMENT_COST = 4, 40


class ValueType(IntEnum):
    """The value types of the GGUF specification (`gguf_metadata_value_type`)."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_FORMATS: Mapping[ValueType, str] = MappingProxyType({
    ValueType.UINT8: "B", ValueType.INT8: "b", ValueType.UINT16: "H", ValueType.INT16: "h",
    ValueType.UINT32: "I", ValueType.INT32: "i", ValueType.FLOAT32: "f", ValueType.BOOL: "B",
    ValueType.UINT64: "Q", ValueType.INT64: "q", ValueType.FLOAT64: "d",
})


@dataclass(frozen=True, slots=True)
class ArrayRef:
    """An array that was left in the file: `length` elements in `n_bytes` bytes from byte `offset` on.

    A text too long to be kept is left as an array of one string.
    """

    element_type: ValueType
    length: int
    offset: int
    n_bytes: int

    def read_numbers(self, path: Path) -> tuple[int | float | bool, ...]:
        """All elements of a numeric array in `path`, the file that it was found in. About 40 bytes an element."""
        with open_cursor(path) as cursor:
            if self.element_type not in _FORMATS:
                raise cursor.problem(f"the array at byte {self.offset} holds texts, not numbers")
            cursor.position = self.offset
            return _numbers(cursor, self.element_type, self.length)

    def read_strings(self, path: Path) -> tuple[bytes, ...]:
        """All strings in `path`, as bytes: tokens need not be UTF-8. About 60 bytes a string beyond its length."""
        with open_cursor(path) as cursor:
            if self.element_type is not ValueType.STRING:
                raise cursor.problem(f"the array at byte {self.offset} holds numbers, not texts")
            cursor.position = self.offset
            cursor.require(8 * self.length, "an array of strings")
            return tuple(cursor.take(cursor.u64("a string's length"), "a string") for _ in range(self.length))


Value = bool | int | float | str | tuple[int | float | bool, ...] | ArrayRef


def _numbers(cursor: Cursor, element_type: ValueType, count: int) -> tuple[int | float | bool, ...]:
    code = _FORMATS[element_type]
    n_bytes = count * struct.calcsize(code)
    data = cursor.take(n_bytes, f"an array of {count} numbers")
    values: tuple[int | float, ...] = struct.unpack(f"<{count}{code}", data)
    if element_type is not ValueType.BOOL:
        return values
    if any(value > 1 for value in values):
        raise cursor.problem(f"a truth value before byte {cursor.position} is neither 0 nor 1")
    return tuple(map(bool, values))


class ValueReader:
    """Reads the values of one file, keeping count of the memory that they take."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._left_bytes = _EAGER_ALLOWANCE_BYTES

    def read(self, key: str) -> Value:
        """The value at the cursor. Raises ModelFileError naming `key` when its type is unknown."""
        value_type = self._type(key)
        if value_type is ValueType.ARRAY:
            return self._array(key)
        if value_type is ValueType.STRING:
            return self._text()
        return _numbers(self._cursor, value_type, 1)[0]

    def _type(self, key: str) -> ValueType:
        number = self._cursor.u32("a value's type")
        try:
            return ValueType(number)
        except ValueError:
            raise self._cursor.problem(f"key {key!r} has the unknown value type {number}") from None

    def _affordable(self, cost_bytes: int) -> bool:
        if cost_bytes > self._left_bytes:
            return False
        self._left_bytes -= cost_bytes
        return True

    def _text(self) -> str | ArrayRef:
        start = self._cursor.position
        n_bytes = self._cursor.u64("a text's length")
        self._cursor.require(n_bytes, "a text")
        if not self._affordable(_TEXT_COST * n_bytes):
            self._cursor.skip(n_bytes, "a text")
            return ArrayRef(ValueType.STRING, 1, start, 8 + n_bytes)
        # Texts are for people and templates: a stray byte in a licence is no reason to refuse the model.
        return self._cursor.take(n_bytes, "a text").decode("utf-8", errors="replace")

    def _array(self, key: str) -> tuple[int | float | bool, ...] | ArrayRef:
        element_type, count = self._type(key), self._cursor.u64("an array's length")
        start = self._cursor.position
        if element_type is ValueType.ARRAY:  # depth is bounded at one, as in llama.cpp
            raise self._cursor.problem(f"key {key!r} holds an array of arrays")
        if element_type is ValueType.STRING:
            self._cursor.skip_strings(count, f"the array {key!r}")
        elif count <= MAX_EAGER_ELEMENTS and self._affordable(_ELEMENT_COST * count):
            return _numbers(self._cursor, element_type, count)
        else:
            self._cursor.skip(count * struct.calcsize(_FORMATS[element_type]), f"the array {key!r}")
        return ArrayRef(element_type, count, start, self._cursor.position - start)
