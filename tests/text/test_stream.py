"""TextStream shows whole characters and never a part of a stop string, however the text is cut into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgert.errors import UsageError
from edgert.text.stream import MAX_STOP_CHARS, MAX_STOPS, TextStream


def run(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(lambda token_id: pieces[token_id], stop)
    shown = [stream.push(token_id) for token_id in range(len(pieces))]
    return [*shown, stream.finish()], stream


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the stop string that is complete first, the longest of those complete at one character."""
    for end in range(len(text) + 1):
        matches = [one for one in stop if text[:end].endswith(one)]
        if matches:
            return text[:end - max(map(len, matches))]
    return text


def chunks(data: bytes, borders: Sequence[int]) -> list[bytes]:
    places = sorted({0, len(data), *(border % (len(data) + 1) for border in borders)})
    return [data[start:end] for start, end in pairwise(places)]


# Few letters, so that stop strings occur, overlap and begin within each other.
texts = st.text(alphabet="abé😀", max_size=30)
stops = st.lists(st.text(alphabet="abé😀", min_size=1, max_size=5), max_size=4)
borders = st.lists(st.integers(0, 200), max_size=40)


@given(texts, stops, borders)
@example("ab", ["abc", "b"], [1])
@example("aab", ["ab", "aab"], [1, 2])
@settings(max_examples=300, deadline=None)
def test_the_shown_text_is_the_text_up_to_the_first_stop_string(text: str, stop: list[str], places: list[int]) -> None:
    shown, stream = run(chunks(text.encode(), places), stop)
    assert "".join(shown) == cut(text, stop)
    assert stream.stopped == any(one in text for one in stop)


@given(texts, stops, borders)
@settings(max_examples=200, deadline=None)
def test_no_beginning_of_a_stop_string_is_shown_before_it_is_decided(
        text: str, stop: list[str], places: list[int]) -> None:
    pieces = chunks(text.encode(), places)
    stream = TextStream(lambda token_id: pieces[token_id], stop)
    shown = ""
    for token_id in range(len(pieces)):
        shown += stream.push(token_id)
        known = b"".join(pieces[:token_id + 1]).decode("utf-8", errors="ignore")
        if not stream.stopped:
            assert not any(one.startswith(known[start:]) for one in stop for start in range(len(shown)))


@given(st.binary(max_size=40), borders)
@example(b"\xf0\x9f\x98", [1, 2])
@example(b"\xed\xa0\x80\xf4\x90\x80\x80", [1, 4])
@settings(max_examples=300, deadline=None)
def test_invalid_bytes_become_replacement_characters_as_python_decodes_them(data: bytes, places: list[int]) -> None:
    shown, _ = run(chunks(data, places))
    assert "".join(shown) == data.decode("utf-8", errors="replace")


def test_a_character_is_shown_when_its_last_byte_has_come() -> None:
    shown, _ = run([b"\xf0\x9f", b"\x98", b"\x80!"])
    assert shown == ["", "", "😀!", ""]


def test_an_unfinished_character_at_the_end_is_shown_as_replacement() -> None:
    shown, _ = run([b"a\xf0\x9f"])
    assert shown == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_nothing_is_shown_after_a_stop_string() -> None:
    shown, stream = run([b"one <st", b"op> two", b"three"], ["<stop>"])
    assert shown == ["one ", "", "", ""]
    assert stream.stopped


def test_what_only_began_like_a_stop_string_is_shown_in_the_end() -> None:
    shown, stream = run([b"one <st"], ["<stop>"])
    assert shown == ["one ", "<st"]
    assert not stream.stopped


@pytest.mark.parametrize("stop", [[""], ["x" * (MAX_STOP_CHARS + 1)], ["x"] * (MAX_STOPS + 1), [3]])
def test_stop_strings_out_of_bounds_are_refused(stop: list[str]) -> None:
    with pytest.raises(UsageError):
        TextStream(lambda _: b"", stop)


def test_the_largest_stop_strings_are_accepted() -> None:
    shown, _ = run([b"a"], ["x" * MAX_STOP_CHARS] * MAX_STOPS)
    assert "".join(shown) == "a"
