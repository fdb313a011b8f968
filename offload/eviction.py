"""Which expert makes room for another: a pure policy over one pool of slots for all layers. Knows no memory, no reads.

An expert's age is the number of whole tokens since its last use. The oldest go first, and among equally old ones those
whose layer is visited farthest ahead. LRU differs in the second part: it always evicts what is visited next, so that a
pool smaller than one token's experts never hits. On the real trace (benchmarks/expert_cache.py) age reaches 0.61 of
Belady's hits at 4 % residency, where LRU has none, and is never below LRU, on cyclic and drifting traces neither, on
which a decayed frequency is.
"""

from __future__ import annotations

from heapq import heappop, heappush

Key = tuple[int, int]  # (layer, expert)


class ExpertSlots:
    """Which expert lies in which of `n_slots` slots. An expert that is held stays; the others are in order of use."""

    def __init__(self, n_slots: int, n_layers: int) -> None:
        self.n_slots, self._n_layers = n_slots, n_layers
        self._slots: dict[Key, int] = {}
        self._free = [*range(n_slots - 1, -1, -1)]
        self._last_use: dict[Key, int] = {}  # of every expert that is not held: step * n_layers + layer
        self._used_at: dict[int, dict[Key, None]] = {}  # the same, by time
        self._times: list[int] = []  # a heap over the times; those of which nothing is left are dropped when met

    def __len__(self) -> int:
        """Experts that have a slot."""
        return len(self._slots)

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def hold(self, key: Key) -> int | None:
        """The slot of an expert that is here; it stays until `release`. None where it is not."""
        slot = self._slots.get(key)
        if slot is not None:
            self._take_out(key)
        return slot

    def last_use(self, key: Key) -> int:
        """The step of the last use of an expert that is here and not held."""
        return self._last_use[key] // self._n_layers

    def claim(self, key: Key, step: int) -> tuple[int, Key | None] | None:
        """A slot for an expert that is not here, held, and the expert that gives way. None when all are held.

        `step` counts tokens: it is the one in which the expert's layer is being visited.
        """
        victim = None
        if not self._free:
            victim = self._victim(step * self._n_layers + key[0])
            if victim is None:
                return None
            self.forget(victim)
        slot = self._slots[key] = self._free.pop()
        return slot, victim

    def release(self, key: Key, step: int) -> None:
        """A held expert may be evicted from now on; `step` is the last in which it is used."""
        time = step * self._n_layers + key[0]
        self._last_use[key] = time
        if time not in self._used_at:
            self._used_at[time] = {}
            heappush(self._times, time)
        self._used_at[time][key] = None

    def forget(self, key: Key) -> None:
        """The expert's slot is free: it was evicted, or could not be read."""
        self._take_out(key)
        self._free.append(self._slots.pop(key))

    def resize(self, n_slots: int) -> list[tuple[Key, int]]:
        """From now on there are `n_slots`; none may be held. The experts that had to go, and their slots."""
        gone = [(key, slot) for key, slot in self._slots.items() if slot >= n_slots]
        for key, _ in gone:
            self._take_out(key)
            del self._slots[key]
        taken = frozenset(self._slots.values())
        self._free = [slot for slot in range(n_slots - 1, -1, -1) if slot not in taken]
        self.n_slots = n_slots
        return gone

    def _take_out(self, key: Key) -> None:
        time = self._last_use.pop(key, None)
        if time is None:
            return  # it is held already
        used = self._used_at[time]
        del used[key]
        if not used:
            del self._used_at[time]

    def _victim(self, now: int) -> Key | None:
        """Of the oldest by whole tokens, the one whose layer has been visited last: its next visit is farthest."""
        while self._times and self._times[0] not in self._used_at:
            heappop(self._times)
        if not self._times:
            return None
        oldest = self._times[0]
        # After a step back (another text after a common beginning) `now` may lie before every use: age 0.
        age = max(0, now - oldest) // self._n_layers
        newest = max(oldest, now - age * self._n_layers)
        time = next(t for t in range(newest, oldest - 1, -1) if t in self._used_at)
        return next(iter(self._used_at[time]))
