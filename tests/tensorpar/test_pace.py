"""A device that becomes slow is found out, one that always was is not, nor is a hiccup."""

from __future__ import annotations

import pytest

from tensorpar.pace import Pace

STEADY = [(0.020, {1: 0.002, 2: 0.004})] * 30


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorpar.pace._SLOW", 2.0)


@pytest.mark.parametrize(("later", "blamed"), [
    ([(0.060, {1: 0.002, 2: 0.042})] * 12, 2), ([(0.060, {1: 0.042, 2: 0.002})] * 12, 1),
    ([(0.038, {1: 0.002, 2: 0.022})] * 40, None),  # slower, but not by so much
    ([(0.060, {1: 0.042, 2: 0.002})] * 4, None),  # a hiccup
    ([(0.060, {1: 0.002, 2: 0.004})] * 40, None),  # the leader itself is slow
    ([(0.060, {1: 0.042, 2: 0.002}), *STEADY[:2]] * 12, None),  # now and then
])
def test_who_is_blamed(later: list[tuple[float, dict[int, float]]], blamed: int | None) -> None:
    pace = Pace()
    assert {pace.passed(*one) for one in STEADY} == {None}
    assert [pace.passed(*one) for one in later][-1] == blamed


def test_who_was_always_slow_stays_and_what_nobody_notices_does_not_count() -> None:
    pace = Pace()
    assert {pace.passed(0.030, {1: 0.025}) for _ in range(50)} == {None}
    quick = Pace()
    assert {quick.passed(seconds, {1: seconds}) for seconds in [0.001] * 20 + [0.010] * 20} == {None}
