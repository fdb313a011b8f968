"""The cold tier on disk: every token's record in a file, written behind and read by a few threads at once.

New tokens wait in memory until there are some, for a record is small; what waits is read from there. Reads are for one
step, so they are waited for: rows come in the order of their positions, each thread its part.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Hyperparameters
from edgert.errors import KVStoreError
from edgert.ggml.backend import Backend, Cancelled
from retrieval.record_file import RecordFile
from retrieval.records import Records, RecordShape

Positions = NDArray[np.int64]
# Random reads of 23 KiB on a disk of 2 GB/s: 92 of them take 7.2 ms by one thread, 3.8 by four, 3.4 by eight.
_N_READERS = 4
N_WAITING = 32  # records that wait to be written; half of them at a time
_POLL_S, _DEADLINE_S = 0.02, 120.0


class DiskTier:
    """One file for the layers that see everything, and one for those with a window, where there are any."""

    def __init__(self, backend: Backend, hp: Hyperparameters, context_length: int,
                 make: Callable[[str, int, int], RecordFile]) -> None:
        """`make(name, stride_bytes, n_records)` opens a file. Raises KVStoreError, NoSpace, OutOfMemory."""
        self._cancel = backend.cancel
        self._parts: dict[RecordShape, _Part] = {}
        shapes = {"full": RecordShape.full(hp), "window": RecordShape.windowed(hp)}
        self._pool = ThreadPoolExecutor(_N_READERS + 1, "kv-read")
        try:
            for name, shape in shapes.items():
                if shape.layers:
                    self._parts[shape] = _Part(backend, shape, make(name, shape.stride_bytes, context_length))
        except BaseException:
            self.close()
            raise

    @property
    def resident_bytes(self) -> int:
        return sum(part.waiting.size_bytes + part.file.checksums.nbytes for part in self._parts.values())

    @property
    def n_tokens(self) -> int:
        return min(part.n_kept for part in self._parts.values())

    @property
    def read_bytes(self) -> int:
        return sum(part.file.read_bytes for part in self._parts.values())

    @property
    def n_reads(self) -> int:
        return sum(part.file.n_reads for part in self._parts.values())

    def fetch(self, records: Records, rows: Positions, positions: Positions) -> None:
        part = self._parts[records.shape]
        waits = positions >= part.n_written
        for row, position in zip(rows[waits].tolist(), positions[waits].tolist(), strict=True):
            records.rows[row] = part.waiting.rows[position % N_WAITING]
        rows, positions = rows[~waits], positions[~waits]
        n_parts = min(_N_READERS, -(-len(positions) // 4))
        self._wait([self._pool.submit(part.file.read, some, _memory(records, into))
                    for some, into in zip(np.array_split(positions, n_parts), np.array_split(rows, n_parts),
                                          strict=True)] if n_parts else [])
        if self._cancel.is_set:
            raise Cancelled

    def keep(self, records: Records, rows: Positions, positions: Positions) -> None:
        part = self._parts[records.shape]
        for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
            if position - part.n_written >= N_WAITING:
                self._wait(part.writing)
                self._write_behind(part)
                self._wait(part.writing)
            part.waiting.rows[position % N_WAITING] = records.rows[row]
            part.n_kept = position + 1
            if part.n_kept - part.n_started >= N_WAITING // 2:
                self._write_behind(part)

    def _write_behind(self, part: _Part) -> None:
        """Begin to write what waits; the write before it has then ended."""
        self._wait(part.writing)
        start, end = part.n_started, part.n_kept
        if start < end:
            part.n_started = end
            part.writing = [self._pool.submit(part.write, start, end)]

    def write_through(self, records: Records, start: int, n: int) -> None:
        """The first `n` records are the tokens from `start` on: a prompt's, many at once."""
        part = self._parts[records.shape]
        self._write_behind(part)  # what waits comes before
        self._wait(part.writing)
        part.file.write(start, _memory(records, np.arange(n, dtype=np.int64)))
        part.n_written = part.n_started = part.n_kept = start + n

    def flush(self) -> None:
        """Everything that was kept is in the files, and on the disk. Raises KVStoreError, NoSpace."""
        for part in self._parts.values():
            self._write_behind(part)
            self._wait(part.writing)
            part.file.sync()

    def truncate(self, n_tokens: int) -> None:
        for part in self._parts.values():
            self._wait(part.writing)
            part.n_kept = min(part.n_kept, n_tokens)
            part.n_started = part.n_written = min(part.n_written, n_tokens)

    def _wait(self, futures: list[Future[None]]) -> None:
        """Until all have ended: no thread touches their memory any more. Raises what the first of them raised."""
        problem: BaseException | None = None
        n_waits = 0
        while futures:
            try:
                futures[0].result(_POLL_S)
            except FutureTimeout:
                n_waits += 1
                if n_waits * _POLL_S > _DEADLINE_S:
                    raise KVStoreError("the KV store", f"the disk has not answered for {_DEADLINE_S:.0f} s") from None
                continue
            except Exception as error:  # of a reader: it belongs to the one who waits
                problem = problem or error
            futures.pop(0)
        if problem is not None:
            raise problem

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for part in self._parts.values():
            part.waiting.close()
            part.file.close()


class _Part:
    """One file, and what waits for it: tokens from `n_written` to `n_kept`, of which those up to `n_started` are on
    their way."""

    def __init__(self, backend: Backend, shape: RecordShape, file: RecordFile) -> None:
        self.file = file
        self.waiting = Records(backend, shape, N_WAITING, "records that wait for the disk")
        self.n_written = self.n_started = self.n_kept = 0
        self.writing: list[Future[None]] = []

    def write(self, start: int, end: int) -> None:
        self.file.write(start, _memory(self.waiting, np.arange(start, end, dtype=np.int64) % N_WAITING))
        self.n_written = end


def _memory(records: Records, rows: Positions) -> list[memoryview]:
    return [records.rows[row].data for row in rows.tolist()]


def temporary_files(directory: Path) -> Callable[[str, int, int], RecordFile]:
    """Files of one process: nameless, gone with it."""
    return lambda name, stride_bytes, n_records: RecordFile.temporary(directory, stride_bytes, n_records)
