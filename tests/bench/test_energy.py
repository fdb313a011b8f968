from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.bench.energy import Sample, WrappingCounter, energy_j

S = 10**9


def test_watts_are_integrated_by_trapezoids() -> None:
    samples = [Sample(0, 10.0), Sample(1 * S, 20.0), Sample(3 * S, 20.0), Sample(4 * S, 0.0)]
    assert energy_j(samples, "watts", 0, 4 * S) == pytest.approx(15 + 40 + 10)
    assert energy_j(samples, "watts", S // 2, S) == pytest.approx((15 + 20) / 2 * 0.5)  # edges lie on the line
    assert energy_j(samples, "watts", 3 * S + S // 2, 4 * S) == pytest.approx(5 * 0.5)


def test_joules_are_subtracted() -> None:
    samples = [Sample(0, 100.0), Sample(2 * S, 104.0), Sample(3 * S, 110.0)]
    assert energy_j(samples, "joules", 0, 3 * S) == pytest.approx(10.0)
    assert energy_j(samples, "joules", 1 * S, 2 * S + S // 2) == pytest.approx(5.0)


@pytest.mark.parametrize("window", [(-1, S), (0, 3 * S), (S, S), (2 * S, S)])
def test_a_window_that_samples_do_not_cover_is_none_and_never_zero(window: tuple[int, int]) -> None:
    samples = [Sample(0, 10.0), Sample(2 * S, 10.0)]
    assert energy_j(samples, "watts", *window) is None
    assert energy_j(samples[:1], "watts", 0, 0) is None and energy_j([], "joules", 0, 1) is None


@given(st.lists(st.floats(0.1, 1000), min_size=3, max_size=20), st.integers(1, 10**9), st.integers(1, 10**9))
def test_neighbouring_windows_add_up(watts: list[float], a: int, b: int) -> None:
    samples = [Sample(number * 10**9, value) for number, value in enumerate(watts)]
    middle = a % (len(watts) - 1) * 10**9 + b
    end = (len(watts) - 1) * 10**9
    whole = energy_j(samples, "watts", 0, end)
    parts = [energy_j(samples, "watts", *window) or 0.0 for window in ((0, middle), (middle, end))]
    assert whole is not None and sum(parts) == pytest.approx(whole)


def test_a_counter_that_wraps_counts_on() -> None:
    counter = WrappingCounter(999)
    assert [counter.advance(value) for value in (900, 950, 10, 10, 999, 0)] == [0, 50, 110, 110, 1099, 1100]
