"""The cold tier on disk: every token's record in a file, written behind and read by a few threads at once.

New tokens wait in memory until there are some, for a record is small; what waits is read from there. A step's rows come
in the order of their positions, each thread its part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np

from edgert.architectures.base import Hyperparameters
from edgert.ggml.backend import Backend, Cancelled, CancelSwitch
from retrieval.arrays import Positions
from retrieval.record_file import N_READERS, Flags, RecordFile, n_runs
from retrieval.records import Records, RecordShape
from retrieval.workers import Workers

# Records that are worth a thread: random reads of 23 KiB on a disk of 2 GB/s, 92 of them, take 7.2 ms by one thread,
# 3.8 by four, 3.4 by eight. Of batches two are enough, one of which is checked while the other is read.
_LEAST_READS, _LEAST_BATCH = 4, 32
N_WAITING = 32  # records that wait to be written; half of them at a time
_log = logging.getLogger(__name__)


class DiskTier:
    """One file for the layers that see everything, and one for those with a window, where there are any."""

    def __init__(self, backend: Backend, hp: Hyperparameters, context_length: int,
                 make: Callable[[str, int, int], RecordFile]) -> None:
        """`make(name, stride_bytes, n_records)` opens a file. Raises KVStoreError, NoSpace, OutOfMemory."""
        self._cancel = backend.cancel
        self._parts: dict[RecordShape, _Part] = {}
        shapes = {"full": RecordShape.full(hp), "window": RecordShape.windowed(hp)}
        self._workers = Workers(N_READERS + 1, "kv-store")
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

    def fetch(self, records: Records, rows: Positions, positions: Positions) -> None:
        self.start_fetch(records, rows, positions).wait()

    def start_fetch(self, records: Records, rows: Positions, positions: Positions) -> DiskFetch:
        self._workers.check()
        part = self._parts[records.shape]
        waits = positions >= part.n_written
        for row, position in zip(rows[waits].tolist(), positions[waits].tolist(), strict=True):
            records.rows[row] = part.waiting.rows[position % N_WAITING]
        rows, positions = rows[~waits], positions[~waits]
        least = _LEAST_BATCH if part.file.reads_batches else _LEAST_READS
        n_parts = min(N_READERS, -(-len(positions) // least))
        shares = list(zip(np.array_split(positions, n_parts), np.array_split(rows, n_parts), strict=True) if n_parts
                      else [])
        reads = []
        for some, into in shares:
            is_there = np.zeros(len(some), bool)
            reads.append((self._workers.submit(partial(part.read, records, into, some, is_there)), is_there))
        return DiskFetch(reads, sum(n_runs(some) for some, _ in shares), len(rows) * records.shape.stride_bytes,
                         self._workers, self._cancel)

    def keep(self, records: Records, rows: Positions, positions: Positions) -> None:
        part = self._parts[records.shape]
        for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
            if position - part.n_written >= N_WAITING:
                self._write_behind(part)
                self._workers.wait(part.writing)
            part.waiting.rows[position % N_WAITING] = records.rows[row]
            part.n_kept = position + 1
            if part.n_kept - part.n_started >= N_WAITING // 2:
                self._write_behind(part)

    def _write_behind(self, part: _Part) -> None:
        """Begin to write what waits; the write before it has then ended, and is taken again where it failed."""
        self._workers.wait(part.writing)
        start, end = part.n_written, part.n_kept
        if start < end:
            part.n_started = end
            part.writing = [self._workers.submit(partial(part.write, start, end))]

    def write_through(self, records: Records, start: int, n: int) -> None:
        """The first `n` records are the tokens from `start` on: a prompt's, many at once."""
        part = self._parts[records.shape]
        self._write_behind(part)  # what waits comes before
        self._workers.wait(part.writing)
        part.file.write(start, _memory(records, np.arange(n, dtype=np.int64)))
        part.n_written = part.n_started = part.n_kept = start + n

    def lacking_bytes(self, n_tokens: int) -> int:
        """Of the disk's space that the records of so many tokens take, what the files do not have yet."""
        return sum(part.file.lacking_bytes(n_tokens) for part in self._parts.values())

    def flush(self) -> None:
        """Everything that was kept is in the files, and on the disk. Raises KVStoreError, NoSpace."""
        for part in self._parts.values():
            self._write_behind(part)
            self._workers.wait(part.writing)
            part.file.sync()

    def truncate(self, n_tokens: int) -> None:
        """Of both files: a step that was stopped may have reached one of them alone."""
        for part in self._parts.values():
            if part.n_kept > n_tokens:
                self._workers.wait(part.writing)
                part.n_kept = n_tokens
                part.n_started = part.n_written = min(part.n_written, n_tokens)

    def close(self) -> bool:
        """End the threads. False when the disk keeps one of them past a deadline: what it reads into must then stay."""
        has_ended = self._workers.close()
        if has_ended:
            for part in self._parts.values():
                part.waiting.close()
                part.file.close()
        else:  # the thread holds on to what it uses
            _log.warning("the KV store: the disk does not answer, and its memory is not given back")
        return has_ended


class DiskFetch:
    """Reads under way, each of some rows, of which it says which are there."""

    def __init__(self, reads: list[tuple[Future[None], Flags]], n_reads: int, read_bytes: int, workers: Workers,
                 cancel: CancelSwitch) -> None:
        self._reads, self._workers, self._cancel = reads, workers, cancel
        self.n_reads, self.read_bytes = n_reads, read_bytes

    @property
    def n_to_come(self) -> int:
        return sum(int(np.count_nonzero(~is_there)) for _, is_there in self._reads)

    def wait(self) -> None:
        self._workers.wait([future for future, _ in self._reads])
        if self._cancel.is_set:
            raise Cancelled


class _Part:
    """One file, and what waits for it: tokens from `n_written` to `n_kept`, of which those up to `n_started` are on
    their way."""

    def __init__(self, backend: Backend, shape: RecordShape, file: RecordFile) -> None:
        self.file = file
        self.waiting = Records(backend, shape, N_WAITING, "records that wait for the disk")
        self.n_written = self.n_started = self.n_kept = 0
        self.writing: list[Future[None]] = []

    def read(self, records: Records, rows: Positions, positions: Positions, is_there: Flags) -> None:
        self.file.read(positions, _memory(records, rows), is_there)

    def write(self, start: int, end: int) -> None:
        self.file.write(start, _memory(self.waiting, np.arange(start, end, dtype=np.int64) % N_WAITING))
        self.n_written = end


def _memory(records: Records, rows: Positions) -> list[memoryview]:
    return [records.rows[row].data for row in rows.tolist()]


def temporary_files(directory: Path) -> Callable[[str, int, int], RecordFile]:
    """Files of one process: nameless, gone with it."""
    return lambda name, stride_bytes, n_records: RecordFile.temporary(directory, stride_bytes, n_records)
