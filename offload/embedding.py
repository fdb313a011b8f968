"""The embedding table, row by row from disk: a token needs one row of some KiB, not the whole table."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.ggml.backend import Buffer
from edgert.ggml.graph import Context, Tensor
from edgert.gguf.model_file import ModelFile
from offload.arena import Arena
from offload.direct_file import ALIGN_BYTES, DirectFile
from offload.readers import Read, Readers, aligned_range

# Rows kept after use, at most one for each token of a text, which repeats its words. 2048 rows of a 4096-wide Q4_0
# table are 4.5 MiB.
_MAX_CACHED_ROWS = 2048
# Rows on their way at a time, in slots of 8 KiB or more.
_ROWS_AT_ONCE = 16


class EmbeddingRows:
    """A small table that holds the rows of one batch, and the rows of the last tokens in memory of its own.

    Rows have `readers` of their own, or each would wait behind megabytes that are read ahead.
    """

    key = "token_embd.weight"

    def __init__(self, files: Sequence[DirectFile], model: ModelFile, context: Context, buffer: Buffer, arena: Arena,
                 batch_size: int, context_length: int, readers: Readers) -> None:
        info = model.tensors[EmbeddingRows.key]
        self._file, self._offset, self._readers = files[info.part], info.offset, readers
        self._row_bytes = _row_bytes(model)
        self.table: Tensor = context.tensor(info.type.id, (info.shape[0], batch_size))
        address = arena.carve(batch_size * self._row_bytes)
        buffer.place(self.table, address)
        self._rows = np.frombuffer(memoryview((ctypes.c_uint8 * (batch_size * self._row_bytes)).from_address(address)),
                                   np.uint8).reshape(batch_size, self._row_bytes)
        self._slot_bytes = _slot_bytes(self._row_bytes)
        self._slots = arena.carve(_ROWS_AT_ONCE * self._slot_bytes)
        self._reads: dict[int, Read] = {}  # by token id, each into a slot of its own
        self._n_kept = min(_MAX_CACHED_ROWS, context_length)
        self._cache: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()

    @staticmethod
    def arena_bytes(model: ModelFile, batch_size: int) -> int:
        """What the table and the slots take of the arena."""
        row_bytes = _row_bytes(model)
        return batch_size * row_bytes + _ROWS_AT_ONCE * _slot_bytes(row_bytes) + 2 * ALIGN_BYTES

    @staticmethod
    def bytes_needed(model: ModelFile, batch_size: int, context_length: int) -> int:
        """The same, and the rows that are kept."""
        n_kept = min(_MAX_CACHED_ROWS, context_length)
        return EmbeddingRows.arena_bytes(model, batch_size) + n_kept * (_row_bytes(model) + 256)

    @property
    def bytes_read(self) -> int:
        return self._readers.bytes_read

    def read(self, token_ids: NDArray[np.int32], is_cancelled: Callable[[], bool]) -> NDArray[np.int32]:
        """Bring the rows of these tokens into the table; the row number of each token in it."""
        for start in range(0, len(token_ids), _ROWS_AT_ONCE):
            group = token_ids[start:start + _ROWS_AT_ONCE].tolist()
            self._fetch(group, is_cancelled)
            for number, token_id in enumerate(group, start):
                self._rows[number] = self._cache[token_id]
                self._cache.move_to_end(token_id)
            while len(self._cache) > self._n_kept:
                self._cache.popitem(last=False)
        return np.arange(len(token_ids), dtype=np.int32)

    def _fetch(self, token_ids: list[int], is_cancelled: Callable[[], bool]) -> None:
        for read in self._reads.values():  # a call that was stopped has left them: they may still write to the slots
            read.settle(is_cancelled)
        missing = [token_id for token_id in dict.fromkeys(token_ids) if token_id not in self._cache]
        self._reads = {token_id: self._start(token_id, slot) for slot, token_id in enumerate(missing)}
        for token_id, read in self._reads.items():
            read.wait(is_cancelled)
            row = read.address + (self._offset + token_id * self._row_bytes) % ALIGN_BYTES
            raw = (ctypes.c_uint8 * self._row_bytes).from_address(row)
            self._cache[token_id] = np.frombuffer(memoryview(raw), np.uint8).copy()

    def _start(self, token_id: int, slot: int) -> Read:
        offset, n_bytes = aligned_range(self._offset + token_id * self._row_bytes, self._row_bytes)
        read = Read(self._file, offset, n_bytes, self._slots + slot * self._slot_bytes)
        self._readers.submit(read)
        return read


def _slot_bytes(row_bytes: int) -> int:
    """A row with the blocks of the disk that it begins and ends in."""
    return -(-row_bytes // ALIGN_BYTES) * ALIGN_BYTES + ALIGN_BYTES


def _row_bytes(model: ModelFile) -> int:
    info = model.tensors[EmbeddingRows.key]
    return info.type.row_bytes(info.shape[0])
