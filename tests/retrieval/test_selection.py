"""What a set of tokens must hold, whatever the scores are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.selection import Floats, Policy, Selection, Survivors, select

SMALL = Policy(budget=24, n_sinks=2, n_recent=6, survivor_share=0.5)


def scores_of(n_tokens: int, seed: int, spread: float = 3.0) -> Floats:
    return np.random.default_rng(seed).standard_normal(n_tokens, dtype=np.float32) * np.float32(spread)


def survivors_at(*positions: int) -> Survivors:
    return Survivors(np.array(positions, np.int64), np.linspace(1, 0.5, len(positions), dtype=np.float32))


def is_well_formed(chosen: Selection, n_tokens: int) -> bool:
    positions = chosen.positions
    return bool((np.diff(positions) > 0).all() and positions[0] == 0 and positions[-1] == n_tokens - 1)


@given(n_tokens=st.integers(1, 400), seed=st.integers(0, 50), budget=st.integers(12, 80), extra=st.integers(0, 40),
       n_survivors=st.integers(0, 60), spread=st.sampled_from([0.0, 0.1, 3.0, 50.0]))
def test_every_set_holds_sinks_recent_and_the_best_and_never_more_than_its_budget(
        n_tokens: int, seed: int, budget: int, extra: int, n_survivors: int, spread: float) -> None:
    policy = Policy(budget, budget + extra, n_sinks=3, n_recent=8, hold=0.0)
    rng = np.random.default_rng(seed)
    old = np.sort(rng.choice(n_tokens, min(n_survivors, n_tokens), replace=False)).astype(np.int64)
    scores = scores_of(n_tokens, seed, spread)
    chosen = select(scores, Survivors(old, rng.random(len(old), dtype=np.float32)), policy)
    assert is_well_formed(chosen, n_tokens)
    assert len(chosen.positions) <= (budget if chosen.mass > policy.least_mass + 1e-4 and not extra else budget + extra)
    assert len(chosen.positions) >= min(n_tokens, budget)
    assert {*range(min(3, n_tokens)), *range(max(0, n_tokens - 8), n_tokens)} <= {*chosen.positions.tolist()}
    if n_tokens > budget:
        assert scores[3:-8].max() in scores[chosen.positions]
    assert chosen.is_sure == (chosen.mass >= policy.least_mass)


def test_a_short_context_is_selected_whole() -> None:
    chosen = select(scores_of(24, 0), survivors_at(3), SMALL)
    assert chosen.positions.tolist() == [*range(24)]
    assert chosen.is_sure


def test_without_survivors_the_rest_of_the_set_is_the_heads_best() -> None:
    scores = scores_of(300, 1)
    chosen = select(scores, None, SMALL)
    best = 2 + np.argsort(-scores[2:-6])[:16]
    assert {*chosen.positions.tolist()} == {0, 1, *best.tolist(), *range(294, 300)}


def test_a_survivor_brings_the_tokens_after_it() -> None:
    chosen = select(np.zeros(300, np.float32), survivors_at(100), SMALL)
    assert {100, 101, 102, 103, 104, 105} <= {*chosen.positions.tolist()}


def test_of_many_survivors_the_strongest_bring_most() -> None:
    survivors = Survivors(np.array([50, 100, 150, 200], np.int64), np.array([1e-6, 1, 1e-6, 1e-6], np.float32))
    chosen = {*select(np.zeros(300, np.float32), survivors, SMALL).positions.tolist()}
    assert {99, 100, 101, 102, 103} <= chosen


def test_survivors_leave_the_head_its_share() -> None:
    scores = np.zeros(400, np.float32)
    scores[[300, 310, 320, 330]] = 40
    chosen = select(scores, survivors_at(*range(10, 200)), SMALL)
    assert {300, 310, 320, 330} <= {*chosen.positions.tolist()}


def test_an_unsure_head_gets_as_much_more_as_it_needs() -> None:
    scores = np.full(300, -20, np.float32)
    scores[100:140] = 5  # forty tokens share its attention: sixteen hold two fifths of it
    frugal, growing = select(scores, None, SMALL), select(scores, None, Policy(24, 100, n_sinks=2, n_recent=6))
    assert not frugal.is_sure
    assert frugal.mass == pytest.approx(16 / 40, abs=0.01)
    assert growing.is_sure
    assert len(growing.positions) == 8 + 32
    sure = scores.copy()
    sure[100] = 30
    assert len(select(sure, None, Policy(24, 100, n_sinks=2, n_recent=6)).positions) == 24


def test_scores_that_are_no_numbers_choose_nothing_and_break_nothing() -> None:
    scores = scores_of(300, 2)
    scores[50:60] = np.nan
    scores[200] = 30
    chosen = select(scores, None, SMALL)
    assert not {*range(50, 60)} & {*chosen.positions.tolist()}
    assert 200 in chosen.positions
    for odd in (np.nan, -np.inf):
        assert is_well_formed(select(np.full(300, odd, np.float32), None, SMALL), 300)


def test_a_budget_that_holds_no_more_than_what_is_forced_is_refused() -> None:
    with pytest.raises(AssertionError, match="recent"):
        Policy(budget=36)


def test_what_is_about_as_good_is_not_exchanged_and_what_is_better_is() -> None:
    policy = Policy(8, n_sinks=1, n_recent=1, survivor_share=0.0, hold=2.0)
    scores = np.zeros(40, np.float32)
    scores[20:26], scores[30], scores[31] = 0.0, 1.0, 3.0
    before = Survivors(np.arange(20, 26, dtype=np.int64), np.ones(6, np.float32))
    chosen = select(scores, before, policy).positions.tolist()
    assert 31 in chosen and 30 not in chosen
    assert len({*range(20, 26)} & {*chosen}) == 5
