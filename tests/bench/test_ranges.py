from __future__ import annotations

import pytest

from apps.bench.ranges import MAX_NUMBERS, parse_numbers, parse_pair
from edgert.errors import UsageError


@pytest.mark.parametrize(("text", "numbers"), [
    ("512", [512]), ("0,512", [0, 512]), ("1-4", [1, 2, 3, 4]), ("128-1024*2", [128, 256, 512, 1024]),
    ("100-500+200", [100, 300, 500]), ("8,1-9+4,8", [8, 1, 5, 9, 8]), ("10-19*3", [10]), (" 1, 2 ", [1, 2]),
    ("5-5*1", [5]), ("0-0*2", [0]),
])
def test_lists_and_ranges_are_llama_benchs(text: str, numbers: list[int]) -> None:
    assert parse_numbers(text) == numbers


@pytest.mark.parametrize("text", ["", ",", "1,", "x", "-1", "1-", "1-2-3", "4-1", "1-4*1", "0-4*2", "1-4+0", "1-4/2",
                                  "1.5", "9" * 10, "0-999999999", f"0-{MAX_NUMBERS}", "٣"])
def test_other_lists_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_numbers(text)


def test_a_pair_is_a_prompt_and_an_answer() -> None:
    assert parse_pair("512,128") == (512, 128)
    for text in ("512", "1,2,3", "a,b", "-1,2", ""):
        with pytest.raises(UsageError):
            parse_pair(text)
