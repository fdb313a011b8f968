"""The longest match is found, is followed, and costs as much in a long text as in a short one."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.text import prompt_lookup
from edgert.text.prompt_lookup import MAX_MATCH, Guess, PromptLookup


def lookup_of(token_ids: Sequence[int]) -> PromptLookup:
    lookup = PromptLookup()
    for token_id in token_ids:
        lookup.append(token_id)
    return lookup


def longest_match(text: Sequence[int]) -> int:
    """By looking everywhere."""
    best = 0
    for end in range(1, len(text)):
        n = 0
        while n < min(end, MAX_MATCH) and text[end - 1 - n] == text[len(text) - 1 - n]:
            n += 1
        best = max(best, n)
    return best


@pytest.mark.parametrize("text", [[], [1], [1, 2, 3], [1, 2, 1], [5, 1, 2, 3, 9, 2, 1]])
def test_without_a_match_of_two_tokens_there_is_no_guess(text: list[int]) -> None:
    assert lookup_of(text).guess(4) is None


def test_what_stood_after_the_match_is_the_guess() -> None:
    assert lookup_of([1, 2, 3, 4, 5, 6, 9, 2, 3]).guess(3) == Guess(2, [4, 5, 6])


def test_a_longer_match_counts_more_than_a_newer_one() -> None:
    assert lookup_of([1, 2, 3, 70, 9, 2, 3, 80, 1, 2, 3]).guess(1) == Guess(3, [70])


def test_of_equal_matches_the_newest_counts() -> None:
    assert lookup_of([1, 2, 70, 4, 1, 2, 80, 5, 1, 2]).guess(1) == Guess(2, [80])


@pytest.mark.parametrize("period", [1, 2, 5])
def test_a_period_goes_on(period: int) -> None:
    text = [*range(100, 150), *(i % period for i in range(23))]
    guess = lookup_of(text).guess(12)
    assert guess is not None
    assert guess.token_ids == [(23 + i) % period for i in range(12)]


def test_a_copy_is_followed_though_its_words_stand_in_many_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of the copy has stood in more newer places than are looked at."""
    monkeypatch.setattr(prompt_lookup, "_MAX_CANDIDATES", 2)
    original = [7, 7, 7, 1, 7, 7, 2, 7, 7, 3, 7, 7, 4, 7, 7, 5]
    lookup = lookup_of([900, 901, *original, *([7, 7, 30] * 20), 900, 901])
    for n_said, token_id in enumerate(original):
        guess = lookup.guess(3)
        assert guess == Guess(2 + n_said, [*original, 7, 7, 30][n_said:n_said + 3])
        lookup.append(token_id)


def test_a_copy_with_another_word_in_it_is_believed_to_go_on() -> None:
    original = [10, 11, 12, 13, 14, 15, 16, 17]
    lookup = lookup_of([*original, 1, 10, 11, 12])
    assert lookup.guess(2) == Guess(3, [13, 14])
    lookup.append(90)
    assert lookup.guess(2) == Guess(1, [14, 15])
    lookup.append(14)
    assert lookup.guess(2) == Guess(1, [15, 16])
    lookup.append(15)
    assert lookup.guess(2) == Guess(2, [16, 17])
    for token_id in (91, 92):  # two others: it has ended
        lookup.append(token_id)
    assert lookup.guess(2) is None


@given(st.lists(st.integers(0, 3), max_size=120))
def test_the_match_is_one_and_no_shorter_than_any_other(text: list[int]) -> None:
    guess = lookup_of(text).guess(5)
    longest = longest_match(text)
    if guess is None:
        assert longest < 2
        return
    ends = [end for end in range(guess.match_length, len(text))
            if text[end - guess.match_length:end] == text[-guess.match_length:] and text[end] == guess.token_ids[0]]
    assert ends
    assert 2 <= guess.match_length <= longest
    if len(text) < 2 + 16:  # every place is a candidate
        assert guess.match_length == longest


def test_work_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst of texts: one token for ever, or two in any order."""
    looked = [0]
    common = PromptLookup._common

    def counted(lookup: PromptLookup, source: int) -> int:
        looked[0] += 1
        return common(lookup, source)

    monkeypatch.setattr(PromptLookup, "_common", counted)
    rng = random.Random(0)
    for text in ([1] * 4000, [rng.randrange(2) for _ in range(4000)]):
        lookup = lookup_of(text)
        looked[0] = 0
        lookup.guess(16)
        assert looked[0] <= 17


def test_large_ids_are_hashed_too() -> None:
    assert lookup_of([2**31 - 1, 2**31 - 2, 5, 2**31 - 1, 2**31 - 2]).guess(1) == Guess(2, [5])
