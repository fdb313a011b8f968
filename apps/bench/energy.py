"""Energy from samples: what a window of time took. Pure functions; where samples come from is in power_sources.py.

A source tells watts at a moment or joules since some beginning. Watts are integrated by trapezoids, joules are
subtracted; both are interpolated at the window's edges. What was not measured is None, never 0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Kind = Literal["watts", "joules"]


@dataclass(frozen=True, slots=True)
class Sample:
    """What a source said at a moment of the monotonic clock."""

    time_ns: int
    value: float


def energy_j(samples: Sequence[Sample], kind: Kind, start_ns: int, end_ns: int) -> float | None:
    """Joules from `start_ns` to `end_ns`; None where the samples, in order of time, do not cover that."""
    if len(samples) < 2 or start_ns < samples[0].time_ns or end_ns > samples[-1].time_ns or end_ns <= start_ns:
        return None
    first, last = (Sample(edge, _at(samples, edge)) for edge in (start_ns, end_ns))
    if kind == "joules":
        return last.value - first.value
    inside = [sample for sample in samples if start_ns < sample.time_ns < end_ns]
    return sum((a.value + b.value) / 2 * (b.time_ns - a.time_ns) / 1e9 for a, b in pairwise([first, *inside, last]))


def _at(samples: Sequence[Sample], time_ns: int) -> float:
    """The value at a time within the samples, on the line between its neighbours."""
    after = bisect_left(samples, time_ns, key=lambda sample: sample.time_ns)
    a, b = samples[max(0, after - 1)], samples[after]
    if b.time_ns == a.time_ns:
        return b.value
    return a.value + (b.value - a.value) * (time_ns - a.time_ns) / (b.time_ns - a.time_ns)


class WrappingCounter:
    """A counter that begins again at 0 after its `largest` value, as RAPL's do every few minutes to hours."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._last: int | None = None
        self._total = 0

    def advance(self, value: int) -> int:
        """What it has counted since the first call. Must be called more often than it wraps."""
        if self._last is not None:
            self._total += value - self._last + (self._largest + 1 if value < self._last else 0)
        self._last = value
        return self._total
