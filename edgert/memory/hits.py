"""How often an expert that is asked for is in memory, and how many different ones a text asks for.

Both follow from one curve: the share of uses that find theirs, by the share of the experts that are in memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from edgert.memory.profile import HitCurve

# Expert hits by share of the experts that are in memory, with eviction by recency. Source: routing of Qwen3-235B in
# decode (the boyle project's curves); replaced by what is measured, where something is.
HIT_CURVE: HitCurve = ((0.0, 0.0), (0.05, 0.34), (0.12, 0.58), (0.25, 0.80), (0.36, 0.89), (0.55, 0.96), (1.0, 1.0))
_SHARE_STEP = 1 / 256


def expected_hit_rate(residency: float, curve: HitCurve = HIT_CURVE) -> float:
    """Share of the experts asked for that are in memory, when `residency` of all experts are: linear between points."""
    if residency >= curve[-1][0]:
        return curve[-1][1]
    return linear(curve, residency)


def asked_share(used_share: float, n_tokens: int, curve: HitCurve = HIT_CURVE) -> float:
    """Share of all experts that a text asks for, once or often, when one token uses `used_share` of them.

    Each token adds what it would miss if all that were asked for before it were in memory, and nothing else: summed in
    steps of the share. Source: a working set grows by its miss rate; Denning and Schwartz, CACM 15(3), 1972, section 4.
    """
    share, left = used_share, float(n_tokens - 1)
    while left > 0 and share < 1 and (missed := 1 - expected_hit_rate(share, curve)) > 0:
        n_needed = _SHARE_STEP / (used_share * missed)
        share += _SHARE_STEP * min(1.0, left / n_needed)
        left -= n_needed
    return min(1.0, share)


def linear(points: Sequence[tuple[float, float]], x: float) -> float:
    """Between the points, of which there are two or more, and beyond them."""
    above = min(max(1, bisect_right([x for x, _ in points], x)), len(points) - 1)
    (x0, y0), (x1, y1) = points[above - 1], points[above]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
