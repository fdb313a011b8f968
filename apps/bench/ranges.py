"""Lists of numbers as llama-bench takes them: `512`, `0,512`, `1-4`, `128-1024*2`, `100-500+100`. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator

from edgert.errors import UsageError

_PART = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?:([+*])(\d{1,9}))?)?", re.ASCII)
_PAIR = re.compile(r"(\d{1,9}),(\d{1,9})", re.ASCII)
MAX_NUMBERS = 1000  # of one list; every number is a test of seconds


def parse_numbers(text: str) -> list[int]:
    """The numbers of a list, in its order. Raises UsageError."""
    numbers: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"{text!r} is not a list of numbers", "Write 512, or 0,512, or 128-1024*2, or 1-9+2.")
        first, last = int(match[1]), int(match[2] or match[1])
        for number in _range(first, last, match[3] or "+", int(match[4] or 1)):
            numbers.append(number)
            if len(numbers) > MAX_NUMBERS:
                raise UsageError(f"{text!r} holds more than {MAX_NUMBERS} numbers", "Write a shorter list.")
    return numbers


def parse_pair(text: str) -> tuple[int, int]:
    """`512,128`: a prompt and the answer that follows it. Raises UsageError."""
    match = _PAIR.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not two numbers with a comma", "Write -pg 512,128.")
    return int(match[1]), int(match[2])


def _range(first: int, last: int, operator: str, step: int) -> Iterator[int]:
    if first > last:
        raise UsageError(f"the range {first}-{last} runs backwards", "Write the smaller number first.")
    number = first
    while number <= last:
        yield number
        following = number * step if operator == "*" else number + step
        if following <= number < last:
            raise UsageError(f"the range {first}-{last}{operator}{step} never ends", "Take a larger step.")
        if following <= number:
            return
        number = following
