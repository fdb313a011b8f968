"""How long sums over devices took, as a histogram: what waiting for the others costs shows in it, and who is slow."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

# Upper bounds in seconds: from a sum on one machine to a Wi-Fi that saves power.
BOUNDS_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1.0)


class SumTimes:
    """Counts of the sums that took up to each bound, and of those that took longer."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._total_s = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self._total_s += seconds

    def to_dict(self) -> dict[str, Any]:
        return {"bounds_s": list(BOUNDS_S), "counts": list(self._counts), "total_s": self._total_s}
