"""How much is guessed: as much as pays, on a device that is told by the times of its passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgert.speculation import MAX_PASS_TOKENS, SHAPES, DraftLength, Speculation

TimeOf = Callable[[int], float]
# What a pass of n tokens takes: bound by the disk, by computing, and by both in turn.
DISK: TimeOf = lambda n: 0.2  # noqa: E731
COMPUTE: TimeOf = lambda n: 0.04 * n  # noqa: E731
BETWEEN: TimeOf = lambda n: max(0.1, 0.03 * n)  # noqa: E731


def run(answer: list[int], prompt: list[int], time_of: TimeOf, lengths: DraftLength | None = None) -> float:
    """Speed over that without guesses, of an answer whose tokens are given."""
    lengths = lengths or DraftLength()
    speculation = Speculation(lengths, prompt, 512)
    n_said, time_s = 1, 0.0
    speculation.said(answer[0])
    while n_said < len(answer):
        draft = speculation.draft(len(answer) - n_said - 1)
        assert len(draft) + 1 in SHAPES
        assert len(draft) < len(answer) - n_said or draft == []
        n_right = next((i for i, (a, b) in enumerate(zip(draft, answer[n_said:], strict=False)) if a != b), len(draft))
        time_s += time_of(len(draft) + 1)
        speculation.measured(len(draft) + 1, time_of(len(draft) + 1))
        for token_id in answer[n_said:n_said + n_right + 1]:
            speculation.said(token_id)
        n_said += n_right + 1
    return (n_said - 1) * time_of(1) / time_s


def copy_with_edits(n_tokens: int, every: int) -> tuple[list[int], list[int]]:
    """A text, and the same with a word replaced now and then."""
    text = [(i * i * 31 + i * 7) % 997 for i in range(n_tokens)]
    return text, [5000 + i if i % every == every - 1 else token_id for i, token_id in enumerate(text)]


def prose(n_tokens: int) -> list[int]:
    """Pairs of words come again, and go on another way each time."""
    return [word for i in range(n_tokens // 3) for word in (i % 10, 20 + i % 10, 1000 + i)]


@pytest.mark.parametrize(("time_of", "least"), [(DISK, 5.0), (BETWEEN, 1.6), (COMPUTE, 0.9)])
def test_a_copy_is_said_as_fast_as_the_device_lets(time_of: TimeOf, least: float) -> None:
    prompt, answer = copy_with_edits(400, 20)
    assert run(answer, prompt, time_of) > least


@pytest.mark.parametrize("time_of", [DISK, BETWEEN, COMPUTE])
def test_nothing_is_lost_where_guesses_are_wrong(time_of: TimeOf) -> None:
    assert run(prose(900), [], time_of) > 0.97


def test_nothing_is_guessed_before_the_device_is_known() -> None:
    lengths = DraftLength()
    assert lengths.choose(32, 100) == 0
    lengths.measured(1, 0.2)
    assert lengths.choose(32, 100) == 3


def test_larger_passes_come_after_smaller_ones() -> None:
    lengths = DraftLength()
    lengths.measured(1, 0.2)
    lengths.measured(4, 0.2)
    assert lengths.choose(32, 100) == 15
    assert lengths.choose(32, 14) == 3
    assert lengths.choose(32, 2) == 0


def test_a_pass_that_takes_too_long_is_not_tried_soon_again_but_some_day() -> None:
    lengths = DraftLength()
    lengths.measured(1, 0.2)
    lengths.measured(4, 2.0)
    chosen = []
    for _ in range(300):
        lengths.measured(1, 0.2)
        chosen.append(lengths.choose(32, 3))
    assert chosen[:200] == [0] * 200
    assert chosen[-1] == 3
    lengths.measured(4, 0.2)  # it was chance: what was measured then is forgotten
    assert lengths.choose(32, 3) == 3


def test_wrong_guesses_make_it_careful_and_right_ones_bold() -> None:
    lengths = DraftLength()
    for n_tokens, time_s in ((1, 0.1), (4, 0.14), (16, 0.4)):
        lengths.measured(n_tokens, time_s)
    before = lengths.choose(4, 100)
    for _ in range(20):
        lengths.saw(4, [False])
    assert lengths.choose(4, 100) == 0
    assert lengths.choose(16, 100) >= before  # a long match is another matter
    for _ in range(60):
        lengths.saw(4, [True] * 15)
    assert lengths.choose(4, 100) == 15


def test_guesses_that_were_not_computed_are_counted_too() -> None:
    """So that it notices for nothing when a text begins to repeat."""
    prompt, answer = copy_with_edits(200, 1000)
    lengths = DraftLength()
    lengths.measured(1, 0.1)
    lengths.measured(4, 1.0)  # never worth it here
    for match_length in (2, 4, 8, 16, 32):
        for _ in range(50):
            lengths.saw(match_length, [False])
    run(answer[:60], prompt, lambda n: 0.1 if n == 1 else 1.0, lengths)
    for n_tokens in (4, 16):
        lengths.measured(n_tokens, 0.1)
    for _ in range(8):
        lengths.measured(4, 0.1)
    assert lengths.choose(32, 100) > 0


@pytest.mark.parametrize("max_pass_tokens", [1, 3, 4, 15, 16, 512])
def test_a_pass_is_no_larger_than_a_batch(max_pass_tokens: int) -> None:
    lengths = DraftLength()
    for n_tokens in SHAPES:
        lengths.measured(n_tokens, 0.1)
    draft = Speculation(lengths, [1, 2, 3] * 30, max_pass_tokens).draft(100)
    assert len(draft) + 1 == max(n for n in SHAPES if n <= min(max_pass_tokens, MAX_PASS_TOKENS))
    assert draft == ([1, 2, 3] * 5)[:len(draft)]


@pytest.mark.parametrize("n_most", [-1, 0, 1, 2])
def test_near_the_answers_end_nothing_is_guessed(n_most: int) -> None:
    lengths = DraftLength()
    for n_tokens in SHAPES:
        lengths.measured(n_tokens, 0.1)
    assert Speculation(lengths, [1, 2, 3] * 30, 512).draft(n_most) == []
