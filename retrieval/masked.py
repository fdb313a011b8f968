"""The whole cache with a mask: attention to chosen tokens without moving any, and to all of them with observation.

The oracle of the hot buffer, and what a step does when it must look at everything. Shares the memory of a dense cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np

from edgert.architectures.base import Hyperparameters
from edgert.engine.batch import Batch
from edgert.engine.kv_cache import DenseKVCache, fill_causal
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Tensor
from retrieval.arrays import Positions
from retrieval.graph import Observation, SelectiveKVGraph


def write_causal(inputs: SelectiveKVGraph, batch: Batch, window: int) -> None:
    """Fill the inputs of a view whose cells are positions: each token sees everything up to its own."""
    if not inputs.arrays:
        inputs.arrays = [Backend.array(t).reshape(batch.n_tokens, -1) for t in inputs.inputs()]
    cells, mask, *others = inputs.arrays
    cells[:, 0] = range(batch.start, batch.end)
    fill_causal(mask, batch.start)
    if inputs.window is not None:
        others[0][:, 0] = range(batch.start, batch.end)
        fill_causal(others[1], batch.start, window)


class MaskedKVCache:
    """Sees `visible` cached tokens, or all of them where that is None; the batch's own always, causally."""

    def __init__(self, dense: DenseKVCache, hp: Hyperparameters, observed_layers: frozenset[int]) -> None:
        self._dense, self._hp, self._observed_layers = dense, hp, observed_layers
        self.visible: Positions | None = None
        self._written: SelectiveKVGraph | None = None

    @property
    def length(self) -> int:
        return self._dense.length

    @length.setter
    def length(self, n_tokens: int) -> None:
        self._dense.length = n_tokens

    @property
    def context_length(self) -> int:
        return self._dense.context_length

    @context_length.setter
    def context_length(self, n_tokens: int) -> None:
        self._dense.context_length = n_tokens

    @property
    def k(self) -> Sequence[Tensor]:
        return self._dense.k

    @property
    def v(self) -> Sequence[Tensor]:
        return self._dense.v

    @property
    def resident_bytes(self) -> int:
        return self._dense.resident_bytes

    def bucket(self, batch: Batch) -> int:
        return self._dense.bucket(batch)

    def open(self, g: Context, n_tokens: int, n_cells: int) -> SelectiveKVGraph:
        return SelectiveKVGraph.of(g, self._hp, self.k, self.v, n_tokens, n_cells, n_cells, self._observed_layers)

    def write(self, inputs: SelectiveKVGraph, batch: Batch) -> None:
        write_causal(inputs, batch, self._hp.window)
        if self.visible is not None:
            mask = inputs.arrays[1]
            mask[:, :batch.start] = -np.inf
            mask[:, self.visible] = 0
        self._written = inputs

    def observations(self) -> list[Observation]:
        """What the last step's graph has observed."""
        return [] if self._written is None else self._written.observations()

    def lease(self, layer: int) -> AbstractContextManager[None]:
        return self._dense.lease(layer)

    def check_room(self, n_tokens: int, trained_length: int | None = None) -> None:
        self._dense.check_room(n_tokens, trained_length)

    def commit(self, batch: Batch) -> None:
        self._dense.commit(batch)

    def truncate(self, n_tokens: int) -> None:
        self._dense.truncate(n_tokens)

    def give_back(self) -> None:
        self._dense.give_back()

    def close(self) -> None:
        """The memory is the dense cache's."""
