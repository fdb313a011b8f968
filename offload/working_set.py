"""How often an expert would be found in a pool of any size, learnt from the ages of the uses of one.

A pool that evicts by age (offload/eviction.py) holds about the experts that were used in the last T tokens, for some T:
their working set. Source: Denning, The working set model for program behavior, CACM 11 (1968): with m(t) the share of
uses older than t tokens, the set of the last T tokens has (uses of a token) * (m(0) + ... + m(T - 1)) members, and of
the uses, 1 - m(T) find theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from offload.eviction import Key

# Ages beyond this many tokens count as never: 2^12 is half of a common context.
_MAX_AGE = 4096
# Fewer tokens say more about the text than about the model.
_LEAST_TOKENS = 32


class WorkingSet:
    """Ages of uses, in whole tokens. There are `n_experts` in all layers together, and a token uses `n_used`."""

    def __init__(self, n_experts: int, n_used: int) -> None:
        self._n_experts, self._n_used = n_experts, n_used
        self._last_use: dict[Key, int] = {}
        self._ages: Counter[int] = Counter()
        self._n_uses = 0
        self._tokens: set[int] = set()

    def use(self, layer: int, experts: Iterable[int], token: int, *, counts: bool) -> None:
        """A layer uses these experts for a token; it `counts` where one token was computed alone."""
        last_use = self._last_use
        for expert in experts:
            key = layer, expert
            if counts:
                self._n_uses += 1
                age = token - last_use.get(key, token - _MAX_AGE - 1)
                if 0 < age <= _MAX_AGE:
                    self._ages[age] += 1
            last_use[key] = token
        if counts and len(self._tokens) < _LEAST_TOKENS:
            self._tokens.add(token)

    def curve(self) -> list[tuple[float, float]] | None:
        """Share of all experts in memory, share of uses that find theirs: points that rise from (0, 0) to (1, 1). None
        before enough was seen."""
        if len(self._tokens) < _LEAST_TOKENS:
            return None
        points, found, residency, next_point = [(0.0, 0.0)], 0, 0.0, 1
        for age in range(1, max(self._ages, default=0) + 1):
            residency += self._n_used * (1 - found / self._n_uses) / self._n_experts
            found += self._ages[age]
            if residency >= 1:
                break
            if age == next_point:
                points.append((residency, found / self._n_uses))
                next_point *= 2
        return [*points, (1.0, 1.0)]
