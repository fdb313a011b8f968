"""Rows on their way into the hot buffer: those that come beside a step, and those that a step waits for.

Knows slots and the cold tier; which tokens are wanted, and why, is retrieval/planning.py's business.
"""

from __future__ import annotations

from edgert.engine.batch import Batch
from edgert.errors import DiskSilent, KVStoreError
from edgert.ggml.backend import Cancelled
from retrieval.arrays import Positions
from retrieval.cold import ColdTier, Fetch
from retrieval.counts import Counts
from retrieval.hot import HotKVCache


class Exchange:
    """Of one hot buffer and one cold tier, which outlive it. Used by one thread at a time."""

    def __init__(self, hot: HotKVCache, cold: ColdTier, counts: Counts) -> None:
        self._hot, self._cold, self._counts = hot, cold, counts
        self._coming: list[tuple[Positions, Fetch]] = []  # beside the step

    def bring_beside(self, likely: Positions) -> None:
        """Begin to bring what a step over `likely` would lack, into slots that the running one does not read."""
        missing, slots = self._hot.look_ahead(likely)
        if len(missing):
            self._coming.append((missing, self._start(slots, missing)))

    def bring(self, chosen: Positions, batch: Batch) -> int:
        """Have the set for a step in the hot buffer, and what its windows see: how many rows of the set had to come
        now."""
        assignment = self._hot.prepare(chosen, batch)
        try:
            self._start(assignment.missing_slots, assignment.missing).wait()
        except BaseException:
            self._hot.slots.drop(assignment.missing)
            raise
        in_window = self._hot.missing_in_ring(batch.start)
        if self._hot.ring is not None and len(in_window):
            self._cold.fetch(self._hot.ring, in_window % self._hot.ring.n_rows, in_window)
            self._hot.fill_ring(in_window)
        return len(assignment.missing)

    def _start(self, slots: Positions, positions: Positions) -> Fetch:
        fetch = self._cold.start_fetch(self._hot.records, slots, positions)
        self._counts.n_fetched += len(positions)
        self._counts.n_reads += fetch.n_reads
        self._counts.read_bytes += fetch.read_bytes
        return fetch

    def settle(self, *, needs: bool) -> int:
        """Nothing is on its way any more: how many rows were. What did not come has no slot; with `needs`, raises
        why."""
        coming, self._coming = self._coming, []
        n_to_come = sum(fetch.n_to_come for _, fetch in coming)
        problem: BaseException | None = None
        for missing, fetch in coming:
            try:
                fetch.wait()
            except BaseException as error:
                self._hot.slots.drop(missing)
                problem = error
        if problem is not None and (needs or not isinstance(problem, (KVStoreError, DiskSilent, Cancelled))):
            raise problem
        return n_to_come
