"""Which cached token lies in which slot of the hot buffer. Pure book-keeping.

Slots need no order (keys are rotated to their positions before they are stored), so a step replaces only what differs
from the one before: elastic loading, SpeContext, arXiv 2512.00722, section 5. There are more slots than tokens in a
set: what a step leaves out stays until its slot is needed, for the next step often wants it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retrieval.arrays import Positions


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a step's tokens lie: `selected` and `new` slots, in the order of their positions; and what must be brought
    in before it computes, `missing` positions into `missing_slots`."""

    selected: Positions
    new: Positions
    missing: Positions
    missing_slots: Positions


class Slots:
    def __init__(self, n_slots: int, context_length: int) -> None:
        self.n_slots = n_slots
        self._slot_of = np.full(context_length, -1, np.int32)
        self._position_of = np.full(n_slots, -1, np.int64)
        self._last_use = np.full(n_slots, -1, np.int64)
        self._step = 0

    @property
    def size_bytes(self) -> int:
        """Memory of the tables."""
        return self._slot_of.nbytes + self._position_of.nbytes + self._last_use.nbytes

    def where(self, positions: Positions) -> Positions:
        """(n,) slots of positions (n,); -1 for those that have none."""
        return self._slot_of[positions].astype(np.int64)

    def assign(self, selected: Positions, start: int, n_new: int) -> Assignment:
        """Slots for a step that attends to `selected` and appends `n_new` tokens from `start` on. What was used
        longest ago makes room."""
        if len(selected) + n_new > self.n_slots:
            raise AssertionError(f"{len(selected)} + {n_new} tokens in {self.n_slots} slots")
        self.forget(start)
        self._step += 1
        found = self._slot_of[selected]
        is_missing = found < 0
        self._last_use[found[~is_missing]] = self._step
        missing, new = selected[is_missing], np.arange(start, start + n_new, dtype=np.int64)
        taken = self._take(len(missing) + n_new)
        self._put(np.concatenate([missing, new]), taken)
        return Assignment(self.where(selected), self.where(new), missing, taken[:len(missing)])

    def look_ahead(self, selected: Positions) -> tuple[Positions, Positions]:
        """What the step after the running one lacks of `selected`, and slots for it: none that the running step reads,
        so it may be less than all."""
        found = self._slot_of[selected]
        self._last_use[found[found >= 0]] = self._step
        n_free = int(np.count_nonzero(self._last_use < self._step))
        missing = selected[found < 0][:n_free]
        taken = self._take(len(missing))
        self._put(missing, taken)
        return missing, taken

    def _take(self, n: int) -> Positions:
        """The `n` slots that were used longest ago, emptied."""
        order = np.argpartition(self._last_use, n - 1)[:n] if 0 < n < self.n_slots else np.arange(n)
        old = self._position_of[order]
        self._slot_of[old[old >= 0]] = -1
        return order

    def _put(self, positions: Positions, slots: Positions) -> None:
        self._slot_of[positions] = slots
        self._position_of[slots] = positions
        self._last_use[slots] = self._step

    def forget(self, start: int) -> None:
        """Positions from `start` on are no longer held."""
        self._empty(np.flatnonzero(self._position_of >= start))

    def drop(self, positions: Positions) -> None:
        """These could not be brought in."""
        slots = self._slot_of[positions]
        self._empty(slots[slots >= 0].astype(np.int64))

    def _empty(self, slots: Positions) -> None:
        self._slot_of[self._position_of[slots]] = -1
        self._position_of[slots] = -1
        self._last_use[slots] = -1
