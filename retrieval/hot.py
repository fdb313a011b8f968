"""The hot buffer: the records of the tokens that the next step attends to, and of the last ones for windowed layers.

A KVCache of `n_slots` cells, whatever the context's length. Which tokens lie in it is decided before a step
(`prepare`); where they come from is retrieval/cold.py's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Hyperparameters
from edgert.engine.batch import Batch
from edgert.errors import ContextOverflow
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Tensor
from retrieval.arrays import Positions
from retrieval.graph import Observation, SelectiveKVGraph
from retrieval.records import Records, RecordShape, in_layer_order
from retrieval.selection import Policy
from retrieval.slots import Assignment, Slots

# Tokens that a step may append: one, or guesses that are verified.
MAX_STEP_TOKENS = 16
_READY = nullcontext()
_BUCKET = 64


def slots_for(policy: Policy) -> int:
    """Slots for a step's set and its own tokens and, where that is one, for what comes meanwhile."""
    n_beside_set = max(MAX_STEP_TOKENS, 1 + policy.n_beside)
    return -(-(policy.largest + n_beside_set) // _BUCKET) * _BUCKET


def ring_rows(hp: Hyperparameters, context_length: int) -> int:
    """Rows for the last tokens that windowed layers see, and a step's own."""
    return -(-(min(hp.window, context_length) + MAX_STEP_TOKENS) // _BUCKET) * _BUCKET


class HotKVCache:
    """`prepare` assigns slots for a step; its caller fills those that are missing; then a graph may compute."""

    def __init__(self, backend: Backend, hp: Hyperparameters, context_length: int, n_slots: int,
                 observed_layers: frozenset[int] = frozenset()) -> None:
        self.context_length, self.length = context_length, 0
        self.n_slots = n_slots
        self.slots = Slots(self.n_slots, context_length)
        self._hp, self._window, self._observed_layers = hp, hp.window, observed_layers
        self.records = Records(backend, RecordShape.full(hp), self.n_slots, "the hot buffer")
        self.ring: Records | None = None
        if hp.window_layers:
            n_ring = ring_rows(hp, context_length)
            self.ring = Records(backend, RecordShape.windowed(hp), n_ring, "the windows' buffer")
            self._ring_positions: Positions = np.full(n_ring, -1, np.int64)
        others = [] if self.ring is None else [self.ring]
        self._k = in_layer_order(*(one.k for one in (self.records, *others)))
        self._v = in_layer_order(*(one.v for one in (self.records, *others)))
        self._assignment: Assignment | None = None
        self._written: SelectiveKVGraph | None = None

    @property
    def k(self) -> Sequence[Tensor]:
        return self._k

    @property
    def v(self) -> Sequence[Tensor]:
        return self._v

    @property
    def resident_bytes(self) -> int:
        return self.records.size_bytes + (self.ring.size_bytes if self.ring else 0) + self.slots.size_bytes

    # -- before a step -------------------------------------------------------------------------------------------
    def prepare(self, selected: Positions, batch: Batch) -> Assignment:
        """Slots for a step over `selected` and the batch's own tokens."""
        if self._assignment is not None and batch.start < self.length:
            self.truncate(batch.start)
        self._assignment = self.slots.assign(selected, batch.start, batch.n_tokens)
        return self._assignment

    def look_ahead(self, selected: Positions) -> tuple[Positions, Positions]:
        """While a step computes: positions that the next one over `selected` lacks, and slots that may be filled."""
        return self.slots.look_ahead(selected)

    def missing_in_ring(self, start: int) -> Positions:
        """Positions before `start` that a windowed layer will see and that the ring does not hold."""
        if self.ring is None:
            return np.zeros(0, np.int64)
        wanted = np.arange(max(0, start - self._window + 1), start, dtype=np.int64)
        is_other: NDArray[np.bool_] = self._ring_positions[wanted % self.ring.n_rows] != wanted
        return np.asarray(wanted[is_other], np.int64)

    def fill_ring(self, positions: Positions) -> Positions:
        """The ring's rows for these positions, which count as filled from now on."""
        assert self.ring is not None
        rows = positions % self.ring.n_rows
        self._ring_positions[rows] = positions
        return rows

    # -- the seam ------------------------------------------------------------------------------------------------
    def bucket(self, batch: Batch) -> int:
        return self.n_slots

    def open(self, g: Context, n_tokens: int, n_cells: int) -> SelectiveKVGraph:
        n_ring = 0 if self.ring is None else self.ring.n_rows
        return SelectiveKVGraph.of(g, self._hp, self._k, self._v, n_tokens, n_cells, n_ring, self._observed_layers)

    def write(self, inputs: SelectiveKVGraph, batch: Batch) -> None:
        """Each token sees the selected ones, those of the batch before it, and itself."""
        assert self._assignment is not None  # `prepare` came first
        if not inputs.arrays:
            inputs.arrays = [Backend.array(t).reshape(batch.n_tokens, -1) for t in inputs.inputs()]
        cells, mask, *window = inputs.arrays
        new = self._assignment.new
        cells[:, 0] = new
        mask[:] = -np.inf
        mask[:, self._assignment.selected] = 0
        for row in range(batch.n_tokens):
            mask[row, new[:row + 1]] = 0
        if self.ring is not None:
            self._write_window(window[0], window[1], batch)
        self._written = inputs

    def _write_window(self, cells: NDArray[np.int64], mask: NDArray[np.float16], batch: Batch) -> None:
        assert self.ring is not None
        cells[:, 0] = self.fill_ring(np.arange(batch.start, batch.end, dtype=np.int64))
        mask[:] = -np.inf
        for row, end in enumerate(range(batch.start + 1, batch.end + 1)):
            mask[row, np.arange(max(0, end - self._window), end) % self.ring.n_rows] = 0

    def lease(self, layer: int) -> AbstractContextManager[None]:
        return _READY

    def check_room(self, n_tokens: int, trained_length: int | None = None) -> None:
        if n_tokens > self.context_length:
            raise ContextOverflow(n_tokens, self.context_length, trained_length)

    def commit(self, batch: Batch) -> None:
        self.length = batch.end

    def truncate(self, n_tokens: int) -> None:
        self.length = min(self.length, n_tokens)
        self.slots.forget(n_tokens)
        if self.ring is not None:
            self._ring_positions[self._ring_positions >= n_tokens] = -1

    def observations(self) -> list[Observation]:
        """What the last step's graph has observed."""
        return [] if self._written is None else self._written.observations()

    def give_back(self) -> None:
        """Its size is fixed."""

    def close(self) -> None:
        self.records.close()
        if self.ring is not None:
            self.ring.close()
