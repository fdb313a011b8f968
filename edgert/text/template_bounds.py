"""How much a chat template may do: characters, values, steps and time, counted for one rendering.

Knows sizes, not Jinja. Every operation of a template that makes something asks here before or directly after, so that
no single one is larger than these bounds and their number is limited (template_sandbox.py sees to it).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

# A prompt of a million tokens has about 4.5 million characters; templates of real models have at most 30,000.
MAX_TEXT_CHARS = 4 * 2**20
MAX_SOURCE_CHARS = 2**16  # compiling so much hostile source takes under a second and 80 MiB
# All texts that one rendering makes, those it throws away included: what it may hold in memory at worst.
MAX_WORK_BYTES = 64 * 2**20
MAX_VALUES = 2**16  # in one list or mapping, nested ones included; a message takes about four
MAX_DEPTH = 64  # of lists within lists; comparing and printing recurse in C
MAX_INT_BITS = 256
MAX_PADDING = 4096  # the width of a column, the size of a batch
DEADLINE_S = 2.0
_PRINTED_CHARS = 80  # of a number of MAX_INT_BITS, or of what stands between two texts of a printed list


class BoundsExceeded(Exception):
    """A template did more than a chat template needs to."""


class Meter:
    """What one rendering has used. `spend` is called by every step, so that an endless loop ends."""

    def __init__(self, deadline_s: float = DEADLINE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._deadline_s = clock, deadline_s
        self._end = clock() + deadline_s
        self._left_bytes = MAX_WORK_BYTES

    def spend(self, n_bytes: int = 1) -> None:
        """Count a step that makes about `n_bytes`. Raises BoundsExceeded."""
        self._left_bytes -= n_bytes
        if self._left_bytes < 0:
            raise BoundsExceeded(f"it makes more than {MAX_WORK_BYTES >> 20} MiB of text")
        if self._clock() > self._end:
            raise BoundsExceeded(f"it takes longer than {self._deadline_s:g} s")

    def hold(self, value: object, *, new_texts: bool = False) -> object:
        """`value`, once its size is found within bounds and counted.

        Texts inside of a list are counted only with `new_texts`: most lists hold texts that were there before.
        """
        n_values, n_chars = measure(value)
        if isinstance(value, str):
            self.spend(_text_bytes(value))
        else:
            self.spend(8 * n_values + (4 * n_chars if new_texts else 0))
        return value


def require_room(n_chars: int) -> None:
    """Make sure that a text of `n_chars` may be made, before it is. Raises BoundsExceeded."""
    if n_chars > MAX_TEXT_CHARS:
        raise BoundsExceeded(f"it makes a text of {n_chars} characters")


def require_room_for(*values: object, times: int = 1, beside: int = 0) -> None:
    """Make sure that `values` may be printed `times` times beside so many other characters, before they are."""
    n_values, n_chars = measure(*values)
    require_room(times * (n_chars + _PRINTED_CHARS * n_values) + beside)


def as_text(value: object) -> str:
    """`str(value)`, refused where it would be too long."""
    if isinstance(value, (list, tuple, Mapping)):
        require_room_for(value)
    return str(value)


def _text_bytes(text: str) -> int:
    return 1 + (len(text) if text.isascii() else 4 * len(text))


def measure(*values: object) -> tuple[int, int]:
    """How many values and characters there are in `values`, everything inside counted every time that it occurs.

    Counting repeats is the point: of [a, a] with a = [b, b] and so on, 40 levels are a terabyte when printed.
    Raises BoundsExceeded.
    """
    n_values = n_chars = 0
    pending: list[tuple[int, object]] = [(0, value) for value in values]
    while pending:
        depth, value = pending.pop()
        n_values += 1
        if isinstance(value, str):
            n_chars += len(value)
        elif isinstance(value, int):
            if value.bit_length() > MAX_INT_BITS:
                raise BoundsExceeded(f"it makes a number of {value.bit_length()} bits")
        elif isinstance(value, (list, tuple, Mapping)):
            if depth >= MAX_DEPTH:
                raise BoundsExceeded(f"it nests values more than {MAX_DEPTH} deep")
            if n_values + len(value) > MAX_VALUES:
                raise BoundsExceeded(f"it makes a list of more than {MAX_VALUES} values")
            parts: Iterable[object] = (
                (part for pair in value.items() for part in pair) if isinstance(value, Mapping) else value)
            pending.extend((depth + 1, part) for part in parts)
        if n_values + len(pending) > 2 * MAX_VALUES or n_chars > MAX_TEXT_CHARS:
            raise BoundsExceeded(f"it makes more than {MAX_VALUES} values or {MAX_TEXT_CHARS} characters at once")
    return n_values, n_chars
