"""A prompt that is longer than memory: dense attention with one layer's keys and values in memory at a time.

The prompt passes layer by layer (edgert/engine/blockwise.py). A layer's earlier rows come from a file that lies layer
by layer, and its new ones go there; afterwards the file is turned into records, token by token, which is how steps read
them. Both ways are sequential; together they move each key and value four times, 0.5 s for 8k tokens of SmolLM2-135M
where prefill takes a minute.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgert.architectures.base import Hyperparameters
from edgert.engine.batch import Batch
from edgert.engine.kv_cache import DenseKVCache
from edgert.errors import KVStoreError, NoSpace, is_full
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context
from retrieval.arrays import Halves
from retrieval.cold import ColdTier
from retrieval.graph import Observation, SelectiveKVGraph
from retrieval.masked import write_causal
from retrieval.records import Records, RecordShape

# Tokens that are turned at a time: requests of 48 KiB for SmolLM2-135M, in 3 MiB of memory.
BLOCK_TOKENS = 128


class LayerFile:
    """K, then V, of each layer, `n_cells` rows of float16 each. Nameless: it goes with the process."""

    def __init__(self, directory: Path, hp: Hyperparameters, n_cells: int, then_bytes: int = 0) -> None:
        """Raises KVStoreError, NoSpace; also where there is no room for `then_bytes` that will be written there."""
        self._row_bytes, self._n_cells = 2 * hp.kv_size, n_cells
        size_bytes = 2 * hp.n_layers * n_cells * self._row_bytes
        try:
            directory.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(directory).free
            if free_bytes < size_bytes + then_bytes:
                raise NoSpace(str(directory), size_bytes + then_bytes, free_bytes)
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise KVStoreError(str(directory), f"cannot be written to: {error.strerror}",
                               "Name another --kv-store.") from error
        self._directory = directory

    def read(self, layer: int, part: int, start: int, rows: Halves) -> None:
        """Rows from `start` on of K (part 0) or V (part 1) into rows (n, kv_size), contiguous."""
        self._move(_read, layer, part, start, rows)

    def write(self, layer: int, part: int, start: int, rows: Halves) -> None:
        self._move(_write, layer, part, start, rows)

    def _move(self, move: Callable[[int, list[memoryview], int], int], layer: int, part: int, start: int,
              rows: Halves) -> None:
        raw, done = rows.reshape(-1).view(np.uint8), 0
        offset = ((2 * layer + part) * self._n_cells + start) * self._row_bytes
        while done < len(raw):
            try:
                n = move(self._file.fileno(), [raw.data[done:]], offset + done)
            except OSError as error:
                if is_full(error):
                    free_bytes = shutil.disk_usage(self._directory).free
                    raise NoSpace(str(self._directory), len(raw) - done, free_bytes) from error
                raise KVStoreError(str(self._directory), f"a prompt's keys and values: {error.strerror}") from error
            if n <= 0:
                raise KVStoreError(str(self._directory), "a prompt's keys and values end too early")
            done += n

    def close(self) -> None:
        self._file.close()


def _read(fd: int, memory: list[memoryview], offset: int) -> int:
    return os.preadv(fd, memory, offset)


def _write(fd: int, memory: list[memoryview], offset: int) -> int:
    return os.pwritev(fd, memory, offset)


class StagedKVCache(DenseKVCache):
    """A dense cache with the memory of one layer. Tokens from `start` to `end` are being computed; of a batch of one
    token, which comes last, some layers are observed."""

    def __init__(self, backend: Backend, hp: Hyperparameters, n_cells: int, file: LayerFile,
                 saw_keys: Callable[[int, int, Halves], None], observed_layers: frozenset[int]) -> None:
        """`saw_keys(layer, start, keys (n, kv_size))` is told of every layer's new keys."""
        super().__init__(backend, replace(hp, n_layers=1), n_cells)
        self._file, self._saw_keys, self._hp, self._observed_layers = file, saw_keys, hp, observed_layers
        self._written: SelectiveKVGraph | None = None
        self.observations: list[Observation] = []
        self._rows: tuple[Halves, Halves] = Backend.array(self.k[0]), Backend.array(self.v[0])
        self.k, self.v = self.k * hp.n_layers, self.v * hp.n_layers
        self.start = self.end = 0

    @contextmanager
    def lease(self, layer: int) -> Iterator[None]:
        for part, rows in enumerate(self._rows):
            self._file.read(layer, part, 0, rows[:self.start])
        yield
        for part, rows in enumerate(self._rows):
            self._file.write(layer, part, self.start, rows[self.start:self.end])
        self._saw_keys(layer, self.start, self._rows[0][self.start:self.end])
        if self._written is not None:  # its memory is every batch's in turn
            self.observations += [replace(one, attention=one.attention.copy(), queries=one.queries.copy())
                                  for one in self._written.observations() if one.layer == layer]

    def open(self, g: Context, n_tokens: int, n_cells: int) -> Any:
        if n_tokens > 1:
            return super().open(g, n_tokens, n_cells)
        return SelectiveKVGraph.of(g, self._hp, self.k, self.v, 1, n_cells, n_cells, self._observed_layers)

    def write(self, inputs: Any, batch: Batch) -> None:
        if not isinstance(inputs, SelectiveKVGraph):
            super().write(inputs, batch)
            return
        write_causal(inputs, batch, self._hp.window)
        self._written, self.observations = inputs, self.observations if self._written is inputs else []


def to_records(file: LayerFile, cold: ColdTier, blocks: list[Records], start: int, end: int) -> None:
    """Keep the tokens from `start` to `end` of the layer file in the cold tier."""
    for records, first, n in in_blocks(blocks, start, end):
        values, rows = records.values(), _rows(records, n)
        for index, layer in enumerate(records.shape.layers):
            for part in (0, 1):
                file.read(layer, part, first, rows)
                values[:n, index, part] = rows
        cold.write_through(records, first, n)


def from_records(file: LayerFile, cold: ColdTier, blocks: list[Records], end: int) -> None:
    """Write the first `end` tokens of the cold tier into the layer file."""
    for records, first, n in in_blocks(blocks, 0, end):
        cold.fetch(records, np.arange(n, dtype=np.int64), np.arange(first, first + n, dtype=np.int64))
        values = records.values()
        for index, layer in enumerate(records.shape.layers):
            for part in (0, 1):
                file.write(layer, part, first, np.ascontiguousarray(values[:n, index, part]))


def _rows(records: Records, n: int) -> Halves:
    return np.empty((n, records.shape.kv_size), np.float16)


def in_blocks(blocks: list[Records], start: int, end: int) -> Iterator[tuple[Records, int, int]]:
    for first in range(start, end, BLOCK_TOKENS):
        for records in blocks:
            yield records, first, min(BLOCK_TOKENS, end - first)


@contextmanager
def record_blocks(backend: Backend, hp: Hyperparameters) -> Iterator[list[Records]]:
    """Memory for a block of records of each kind of layer, for as long as a prompt's are moved."""
    shapes = [shape for shape in (RecordShape.full(hp), RecordShape.windowed(hp)) if shape.layers]
    blocks = [Records(backend, shape, BLOCK_TOKENS, "records of a prompt") for shape in shapes]
    try:
        yield blocks
    finally:
        for block in blocks:
            block.close()
