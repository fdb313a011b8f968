"""Reads the values of a client's JSON object: each has a type and bounds, and what is wrong is named.

Knows JSON's types. Does not know what any value is for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from edgert.errors import InvalidRequest

MAX_SHOWN_CHARS = 60


class Fields:
    """One object of a request. A field that is null counts as left out. Raises InvalidRequest with its name."""

    def __init__(self, values: Any, where: str = "") -> None:
        if not isinstance(values, Mapping):
            raise InvalidRequest(f"{where or 'the body'} is not a JSON object", "Send an object.", where or None)
        self._values, self._where = values, where

    def name(self, key: str) -> str:
        """How a message calls a field."""
        return f"{self._where}.{key}" if self._where else key

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def raw(self, key: str) -> Any:
        return self._values.get(key)

    def text(self, key: str, default: str | None = None, max_chars: int = 2**24) -> str | None:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or len(value) > max_chars:
            raise self.wrong(key, f"a text of at most {max_chars} characters")
        return check_text(value, self.name(key))

    def required_text(self, key: str, max_chars: int = 2**24) -> str:
        value = self.text(key, None, max_chars)
        if value is None:
            raise self.wrong(key, "a text")
        return value

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int | None:
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():  # some clients write 1.0
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float | None:
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not (
                low <= value <= high):
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        value = self._values.get(key)
        if value is None:
            return default
        if value not in choices or not isinstance(value, str):
            raise self.wrong(key, f"one of {', '.join(choices)}")
        return value

    def items(self, key: str, max_items: int) -> list[Any]:
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > max_items:
            raise self.wrong(key, f"a list of at most {max_items} items")
        return value

    def object(self, key: str) -> Fields | None:
        value = self._values.get(key)
        return None if value is None else Fields(value, self.name(key))

    def wrong(self, key: str, wanted: str) -> InvalidRequest:
        value = self._values.get(key)
        if value is None:
            return InvalidRequest(f"{self.name(key)} is missing", f"Give {wanted}.", self.name(key))
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= MAX_SHOWN_CHARS else f"{shown[:MAX_SHOWN_CHARS]}..."
        return InvalidRequest(f"{self.name(key)} is {shown}", f"Give {wanted}.", self.name(key))


def check_text(text: str, name: str) -> str:
    """`text`, unless it cannot be written as UTF-8 (JSON can hold half of a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} holds half of a surrogate pair", "Send text that can be written as UTF-8.",
                             name) from None
    return text
