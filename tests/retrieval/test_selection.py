"""What a set of tokens must hold, whatever the scores are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.repeats import repeats
from retrieval.selection import Floats, Policy, Positions, Selection, Survivors, merits, select

SMALL = Policy(budget=24, n_sinks=2, n_recent=6)


def scores_of(n_tokens: int, seed: int, spread: float = 3.0) -> Floats:
    return np.random.default_rng(seed).standard_normal(n_tokens, dtype=np.float32) * np.float32(spread)


def set_of(scores: Floats, survivors: Survivors | None, repeated: Floats | None, policy: Policy,
           held: Positions | None = None, n_exchanged: int | None = None) -> Selection:
    return select(merits(scores, survivors, policy), repeated, policy, held, n_exchanged)


def survivors_at(*positions: int) -> Survivors:
    return Survivors(np.array(positions, np.int64), np.linspace(1, 0.5, len(positions), dtype=np.float32))


def is_well_formed(chosen: Selection, n_tokens: int) -> bool:
    positions = chosen.positions
    return bool((np.diff(positions) > 0).all() and positions[0] == 0 and positions[-1] == n_tokens - 1)


@given(n_tokens=st.integers(1, 400), seed=st.integers(0, 50), budget=st.integers(12, 80), extra=st.integers(0, 40),
       n_survivors=st.integers(0, 60), spread=st.sampled_from([0.0, 0.1, 3.0, 50.0]))
def test_every_set_holds_sinks_recent_and_the_best_and_never_more_than_its_budget(
        n_tokens: int, seed: int, budget: int, extra: int, n_survivors: int, spread: float) -> None:
    policy = Policy(budget, budget + extra, n_sinks=3, n_recent=8)
    rng = np.random.default_rng(seed)
    old = np.sort(rng.choice(n_tokens, min(n_survivors, n_tokens), replace=False)).astype(np.int64)
    scores = scores_of(n_tokens, seed, spread)
    repeated = rng.random(n_tokens, dtype=np.float32)
    chosen = set_of(scores, Survivors(old, rng.random(len(old), dtype=np.float32)), repeated, policy)
    assert is_well_formed(chosen, n_tokens)
    assert len(chosen.positions) <= (budget if chosen.mass > policy.least_mass + 1e-4 and not extra else budget + extra)
    assert len(chosen.positions) >= min(n_tokens, budget)
    assert {*range(min(3, n_tokens)), *range(max(0, n_tokens - 8), n_tokens)} <= {*chosen.positions.tolist()}
    assert chosen.is_sure == (chosen.mass >= policy.least_mass)


def test_a_short_context_is_selected_whole() -> None:
    chosen = set_of(scores_of(24, 0), survivors_at(3), None, SMALL)
    assert chosen.positions.tolist() == [*range(24)]
    assert chosen.is_sure


def test_without_survivors_the_rest_of_the_set_is_the_heads_best() -> None:
    scores = scores_of(300, 1)
    chosen = set_of(scores, None, None, SMALL)
    best = 2 + np.argsort(-scores[2:-6])[:16]
    assert {*chosen.positions.tolist()} == {0, 1, *best.tolist(), *range(294, 300)}


def test_a_survivor_brings_the_tokens_after_it() -> None:
    chosen = set_of(np.zeros(300, np.float32), survivors_at(100), None, SMALL)
    assert {100, 101, 102} <= {*chosen.positions.tolist()}


def test_of_many_survivors_the_strongest_bring_most() -> None:
    survivors = Survivors(np.array([50, 100, 150, 200], np.int64), np.array([1e-6, 1, 1e-6, 1e-6], np.float32))
    chosen = {*set_of(np.zeros(300, np.float32), survivors, None, Policy(11, n_sinks=2, n_recent=6)).positions.tolist()}
    assert {100, 101, 102} <= chosen and not {50, 150, 200} & chosen


def test_survivors_leave_the_head_its_share() -> None:
    scores = np.zeros(400, np.float32)
    scores[[300, 310, 320, 330]] = 40
    chosen = set_of(scores, survivors_at(*range(10, 200)), np.ones(400, np.float32), SMALL)
    assert {300, 310, 320, 330} <= {*chosen.positions.tolist()}


def test_what_repeats_has_its_place_beside_a_head_that_is_sure_of_others() -> None:
    scores, repeated = np.zeros(400, np.float32), np.zeros(400, np.float32)
    scores[300:400] = 20
    repeated[[50, 60]] = 1, 1e-3
    chosen = {*set_of(scores, None, repeated, SMALL).positions.tolist()}
    assert 50 in chosen and 60 not in chosen
    assert 50 not in set_of(scores, None, None, SMALL).positions


def test_a_token_whose_forerunners_stand_at_the_texts_end_repeats_it() -> None:
    ids = np.array([7, 1, 2, 3, *range(20, 40), 5, 2, 3, 8, 9, 3, *range(40, 50), 1, 2], np.int32)
    strength = repeats(ids, 3)  # the step reads a 3, after 1 2
    assert strength.argmax() == 4, "1 2 3 stood before it"
    assert strength[27] > strength[28] > strength[29] > 0, "2 3 stood before it, and what follows counts less"
    assert strength[4] > 3 * strength[27], "a longer match counts for more"
    assert not strength[:4].any() and not strength[13:27].any()
    assert strength[30] == pytest.approx(1 + 4 * 0.8 ** 3), "one token alone brings no more than the next"
    assert strength[31] == pytest.approx(4 * 0.8 ** 4) and not strength[36:].any()


@given(ids=st.lists(st.integers(0, 3), max_size=40), last=st.integers(0, 3))
def test_repeats_of_any_text_are_those_of_a_plain_search(ids: list[int], last: int) -> None:
    text, expected = [*ids, last], np.zeros(len(ids))
    for end in range(len(ids) - 1):  # an earlier occurrence of the text's end, whose last token is here
        for length in range(1, 5):
            if length > end + 1 or text[end + 1 - length:end + 1] != text[len(text) - length:]:
                break
            for ahead in range(1 if length == 1 else 9):
                if end + 1 + ahead < len(ids):
                    expected[end + 1 + ahead] += 4.0 ** (length - 1) * 0.8 ** ahead
    assert repeats(np.array(ids, np.int32), last) == pytest.approx(expected, rel=1e-5)


def test_an_unsure_head_gets_as_much_more_as_it_needs() -> None:
    scores = np.full(300, -20, np.float32)
    scores[100:142] = 5  # forty-two tokens share its attention: four fifths are held by 34
    frugal = set_of(scores, None, None, SMALL)
    growing = set_of(scores, None, None, Policy(24, 100, n_sinks=2, n_recent=6))
    assert not frugal.is_sure
    assert frugal.mass == pytest.approx(16 / 42, abs=0.01)
    assert growing.is_sure
    assert len(growing.positions) == 8 + 34
    sure = scores.copy()
    sure[100] = 30
    assert len(set_of(sure, None, None, Policy(24, 100, n_sinks=2, n_recent=6)).positions) == 24


def test_scores_that_are_no_numbers_choose_nothing_and_break_nothing() -> None:
    scores = scores_of(300, 2)
    scores[50:60] = np.nan
    scores[200] = 30
    chosen = set_of(scores, None, None, SMALL)
    assert not {*range(50, 60)} & {*chosen.positions.tolist()}
    assert 200 in chosen.positions
    for odd in (np.nan, -np.inf):
        assert is_well_formed(set_of(np.full(300, odd, np.float32), None, None, SMALL), 300)


def test_a_budget_that_holds_no_more_than_what_is_forced_is_refused() -> None:
    with pytest.raises(AssertionError, match="recent"):
        Policy(budget=36)


def test_what_is_about_as_good_is_not_exchanged_and_what_is_better_is() -> None:
    policy = Policy(8, n_sinks=1, n_recent=1, survivor_weight=0.0, hold=4.0)
    scores = np.zeros(40, np.float32)
    scores[30], scores[31] = 1.0, 3.0
    chosen = set_of(scores, None, None, policy, np.arange(20, 26)).positions.tolist()
    assert 31 in chosen and 30 not in chosen
    assert len({*range(20, 26)} & {*chosen}) == 5


def test_of_a_set_that_is_held_only_so_many_are_exchanged_and_those_that_gain_most() -> None:
    policy, scores = Policy(24, n_sinks=2, n_recent=6, hold=1.0), np.zeros(300, np.float32)
    scores[100:110] = np.arange(1, 11)
    scores[50:60] = 5
    held = np.array([0, 1, *range(50, 66), *range(294, 300)])
    chosen = {*set_of(scores, None, None, policy, held, 4).positions.tolist()}
    assert chosen - {*held.tolist()} == {106, 107, 108, 109}
    assert {*range(50, 60)} <= chosen, "what merits least has left"
    assert 105 in set_of(scores, None, None, policy, held).positions


def test_what_a_step_must_wait_for_comes_only_if_it_gains_much() -> None:
    policy, scores = Policy(24, n_sinks=2, n_recent=6, hold=1.0, late_hold_per_token=1 / 3), np.zeros(300, np.float32)
    scores[100], scores[110] = np.log([4, 20])  # so many times what is held
    known, held = merits(scores, None, policy), np.array([0, 1, *range(50, 66), *range(294, 300)])
    assert {100, 110} <= {*select(known, None, policy, held, 4).positions.tolist()}
    late = {*select(known, None, policy, held, 4, is_late=True).positions.tolist()}
    assert 110 in late and 100 not in late


@given(n_tokens=st.integers(30, 400), seed=st.integers(0, 50), n_held=st.integers(0, 60),
       n_exchanged=st.integers(0, 30), extra=st.sampled_from([0, 20]))
def test_a_set_is_as_large_as_ever_however_few_are_held_or_exchanged(n_tokens: int, seed: int, n_held: int,
                                                                     n_exchanged: int, extra: int) -> None:
    policy = Policy(24, 24 + extra, n_sinks=2, n_recent=6)
    rng = np.random.default_rng(seed)
    held = np.sort(rng.choice(n_tokens + 5, min(n_held, n_tokens), replace=False)).astype(np.int64)
    chosen = set_of(scores_of(n_tokens, seed), None, None, policy, held, n_exchanged)
    assert is_well_formed(chosen, n_tokens)
    assert 24 <= len(chosen.positions) <= 24 + extra
    between = chosen.positions[(chosen.positions >= 2) & (chosen.positions < n_tokens - 6)]
    n_mine = int(((held >= 2) & (held < n_tokens - 6)).sum())
    assert len(np.setdiff1d(between, held)) <= max(n_exchanged, 16 - n_mine)
