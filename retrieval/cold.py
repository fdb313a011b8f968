"""Where the keys and values of every token lie, and how a step's come into the hot buffer.

Contract of a cold tier: `fetch` fills rows of records with those of positions that were kept, and returns when they are
there; `start_fetch` returns before; `keep` takes the rows of new tokens; `truncate` forgets. Here the tier that costs
nothing: a dense cache whose memory there is. retrieval/store.py has the one on disk.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from edgert.engine.kv_cache import DenseKVCache
from edgert.ggml.backend import Backend
from retrieval.arrays import Halves, Positions
from retrieval.records import Records


class Fetch(Protocol):
    """Rows on their way."""

    n_reads: int  # of the disk
    read_bytes: int

    @property
    def n_to_come(self) -> int:
        """How many are not there yet."""
        ...

    def wait(self) -> None:
        """Until nothing writes to the rows any more. Raises as `ColdTier.fetch`."""
        ...


class ColdTier(Protocol):
    @property
    def n_tokens(self) -> int:
        """How many tokens, from the first on, were kept."""
        ...

    @property
    def resident_bytes(self) -> int:
        """Memory that it takes now."""
        ...

    def fetch(self, records: Records, rows: Positions, positions: Positions) -> None:
        """Fill `rows` of the records with the tokens at `positions` (rising). Raises Cancelled, and an EdgertError for
        what cannot be read or is damaged; the rows' content is then undefined."""
        ...

    def start_fetch(self, records: Records, rows: Positions, positions: Positions) -> Fetch:
        """As `fetch`, which is this and a wait. Nothing is truncated before that."""
        ...

    def keep(self, records: Records, rows: Positions, positions: Positions) -> None:
        """The tokens at `positions`, the next ones in order, are in these rows."""
        ...

    def write_through(self, records: Records, start: int, n: int) -> None:
        """The first `n` records are the tokens from `start` on, and are kept before this returns: many at once."""
        ...

    def truncate(self, n_tokens: int) -> None: ...

    def close(self) -> bool:
        """False where, past a deadline, something still fetches: the records that it fills must then stay."""
        ...


class _Arrived:
    n_reads = read_bytes = n_to_come = 0

    def wait(self) -> None:
        """They are there."""


class DenseTier:
    """Over the memory of a dense cache, which owns it."""

    def __init__(self, dense: DenseKVCache) -> None:
        self._dense = dense
        self._k: list[Halves] = [Backend.array(t) for t in dense.k]  # each (n_cells, kv_size)
        self._v: list[Halves] = [Backend.array(t) for t in dense.v]

    @property
    def n_tokens(self) -> int:
        return self._dense.length

    @property
    def resident_bytes(self) -> int:
        return self._dense.resident_bytes

    def fetch(self, records: Records, rows: Positions, positions: Positions) -> None:
        values = records.values()
        for index, layer in enumerate(records.shape.layers):
            values[rows, index, 0] = self._k[layer][positions]
            values[rows, index, 1] = self._v[layer][positions]

    def start_fetch(self, records: Records, rows: Positions, positions: Positions) -> Fetch:
        self.fetch(records, rows, positions)
        return _Arrived()

    def keep(self, records: Records, rows: Positions, positions: Positions) -> None:
        values = records.values()
        for index, layer in enumerate(records.shape.layers):
            self._k[layer][positions] = values[rows, index, 0]
            self._v[layer][positions] = values[rows, index, 1]

    def write_through(self, records: Records, start: int, n: int) -> None:
        self.keep(records, np.arange(n, dtype=np.int64), np.arange(start, start + n, dtype=np.int64))

    def keys(self, layer: int, start: int, end: int) -> Halves:
        """(end - start, kv_size) of one layer."""
        return self._k[layer][start:end]

    def truncate(self, n_tokens: int) -> None:
        """The dense cache does that."""

    def close(self) -> bool:
        """The memory is the dense cache's."""
        return True
