"""Notices that passes have become slow, and which device the others wait for: pure bookkeeping.

Compares with the same devices' own best: what a plan promised may be wrong, what was reached is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median

# A pause of so many single tokens is no trend; so much slower than at its best is, where a reader would notice.
_N_PASSES, _SLOW, _NOTICED_S = 12, 2.0, 0.02
# The one to blame is waited for at least this share of the time.
_BLAMED_SHARE = 0.4


class Pace:
    """The passes of single tokens of one epoch."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=_N_PASSES)
        self._waits_s: deque[Mapping[int, float]] = deque(maxlen=_N_PASSES)
        self._best_s = float("inf")

    @property
    def pass_s(self) -> float:
        """What a pass takes now."""
        return median(self._times_s)

    def passed(self, seconds: float, waited_s: Mapping[int, float]) -> int | None:
        """A pass took so long, of which the leader waited so long for each rank. The rank that has become slow."""
        self._times_s.append(seconds)
        self._waits_s.append(waited_s)
        if len(self._times_s) < _N_PASSES:
            return None
        self._best_s = min(self._best_s, self.pass_s)
        if self.pass_s < max(_SLOW * self._best_s, self._best_s + _NOTICED_S):
            return None
        typical = {rank: median(one.get(rank, 0.0) for one in self._waits_s) for rank in waited_s}
        rank = max(typical, key=typical.__getitem__, default=None)
        return rank if rank is not None and typical[rank] >= _BLAMED_SHARE * self.pass_s else None
