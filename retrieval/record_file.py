"""Records in a file, one for each token in order, past the page cache where the system lets us.

A checksum for each record is kept in memory (and on disk by retrieval/sessions.py): what is read is what was written,
or an error. A token's record is one read; neighbours are one request, and where the disk takes many requests in one
call, a step's go there together. Knows no layers and no selection.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.errors import KVStoreError, NoSpace, is_full
from edgert.uncached_file import METHODS, Method, UncachedFile
from retrieval.arrays import Positions
from retrieval.batched_reads import MAX_READS, BatchedReads

Checksums = NDArray[np.uint32]
Flags = NDArray[np.bool_]
# Buffers of one request: Linux takes 1024, and a run that long is no random access.
_MAX_RUN = 256
_SECTOR_BYTES = 512
N_READERS = 4
"""Threads that may read batches at the same time."""
_log = logging.getLogger(__name__)


class RecordFile:
    """`n_records` of `stride_bytes` each. Reads may come from several threads; writes from one, and not of what is
    being read."""

    def __init__(self, path: Path, stride_bytes: int, n_records: int, methods: tuple[Method, ...] = METHODS) -> None:
        self.path, self.stride_bytes, self.n_records = path, stride_bytes, n_records
        self.checksums: Checksums = np.zeros(n_records, np.uint32)
        self.read_bytes = self.n_reads = 0
        try:
            self._file = UncachedFile(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, _SECTOR_BYTES, may_be_empty=True,
                                      methods=methods)
        except OSError as error:
            raise KVStoreError(str(path), f"cannot be opened: {error.strerror}", "Name another --kv-store.") from error
        self._batches: BatchedReads | None = None
        if self.method == "direct":
            with suppress(OSError):  # not on this system, or all are taken
                self._batches = BatchedReads(self._file.fd, N_READERS)
        _log.info("%s is read by %s%s", path, self.method, ", in batches" if self.reads_batches else "")

    @property
    def method(self) -> Method:
        return self._file.method

    @property
    def reads_batches(self) -> bool:
        """Whether one thread keeps the disk as busy as several do."""
        return self._batches is not None

    @classmethod
    def temporary(cls, directory: Path, stride_bytes: int, n_records: int) -> RecordFile:
        """A file without a name: it goes with the process, however that ends. Raises NoSpace."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(directory).free
            fd, name = tempfile.mkstemp(".kv", dir=directory)
        except OSError as error:
            raise KVStoreError(str(directory), f"cannot be written to: {error.strerror}",
                               "Name another --kv-store.") from error
        os.close(fd)
        try:
            if free_bytes < n_records * stride_bytes:
                raise NoSpace(str(directory), n_records * stride_bytes, free_bytes)
            return cls(Path(name), stride_bytes, n_records)
        finally:
            Path(name).unlink(missing_ok=True)

    def lacking_bytes(self, n_records: int) -> int:
        """What the disk still has to give for so many records."""
        return max(0, n_records * self.stride_bytes - 512 * os.fstat(self._file.fd).st_blocks)

    # -- writing -------------------------------------------------------------------------------------------------
    def write(self, start: int, rows: Sequence[memoryview]) -> None:
        """Records from `start` on, each of stride_bytes at a multiple of a sector. Raises KVStoreError, NoSpace."""
        for first in range(0, len(rows), _MAX_RUN):
            part = rows[first:first + _MAX_RUN]
            self._write_run(start + first, part)
            for position, row in enumerate(part, start + first):
                self.checksums[position] = checksum(row, position)

    def _write_run(self, start: int, rows: Sequence[memoryview]) -> None:
        offset, wanted = start * self.stride_bytes, len(rows) * self.stride_bytes
        try:
            written = self._file.write(rows, offset)
            if written < wanted:  # a full disk takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if is_full(error):
                disk = os.fstatvfs(self._file.fd)
                free_bytes = disk.f_bavail * disk.f_frsize
                raise NoSpace(str(self.path.parent), wanted, free_bytes) from error
            raise KVStoreError(str(self.path), f"writing failed: {error.strerror}") from error
        self._file.forget(offset, wanted)

    # -- reading -------------------------------------------------------------------------------------------------
    def read(self, positions: Positions, rows: Sequence[memoryview], is_there: Flags | None = None) -> None:
        """The records at `positions` (rising) into `rows`, and each compared with its checksum. Raises KVStoreError.
        `is_there` (n,) is set of each as soon as it is."""
        is_there = np.zeros(len(positions), bool) if is_there is None else is_there
        if self._batches is not None and len(positions) <= MAX_READS:
            self._read_batch(self._batches, positions, rows, is_there)
            return
        breaks = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
        for start, end in pairwise(breaks):
            for first in range(start, end, _MAX_RUN):
                last = min(first + _MAX_RUN, end)
                self._read_run(int(positions[first]), rows[first:last])
        for index, (position, row) in enumerate(zip(positions.tolist(), rows, strict=True)):
            self._check(position, row)
            is_there[index] = True

    def _read_batch(self, batches: BatchedReads, positions: Positions, rows: Sequence[memoryview],
                    is_there: Flags) -> None:
        """Each record is checked while others are still to come; the system makes one request of neighbours."""
        addresses = np.array([ctypes.addressof(ctypes.c_char.from_buffer(row)) for row in rows], np.uint64)
        try:
            with closing(batches.read(addresses, self.stride_bytes, positions * self.stride_bytes)) as ended:
                for index, n in ended:
                    if n < 0:
                        raise OSError(-n, os.strerror(-n))
                    self._arrived(n, self.stride_bytes)
                    self._check(int(positions[index]), rows[index])
                    is_there[index] = True
        except OSError as error:
            raise KVStoreError(str(self.path), f"reading failed: {error.strerror}") from error
        self.n_reads += n_runs(positions)

    def _arrived(self, n_bytes: int, wanted_bytes: int) -> None:
        if n_bytes != wanted_bytes:
            raise KVStoreError(str(self.path), "the file has become shorter while it was in use")
        self.read_bytes += n_bytes

    def _check(self, position: int, row: memoryview) -> None:
        if checksum(row, position) != self.checksums[position]:
            raise KVStoreError(str(self.path), f"the keys and values of token {position} are damaged")

    def _read_run(self, start: int, rows: Sequence[memoryview]) -> None:
        offset, wanted = start * self.stride_bytes, len(rows) * self.stride_bytes
        try:
            n = self._file.read(rows, offset)
        except OSError as error:
            raise KVStoreError(str(self.path), f"reading failed: {error.strerror}") from error
        self._arrived(n, wanted)
        self._file.forget(offset, wanted)
        self.n_reads += 1

    def sync(self) -> None:
        """What was written is on the disk when this returns. Raises KVStoreError."""
        try:
            os.fdatasync(self._file.fd)
        except OSError as error:
            raise KVStoreError(str(self.path), f"writing failed: {error.strerror}") from error

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._file.close()


def n_runs(positions: Positions) -> int:
    """Requests that positions (rising) take: neighbours are one."""
    return 0 if not len(positions) else 1 + int(np.count_nonzero(np.diff(positions) != 1))


def checksum(record: memoryview, position: int) -> int:
    """CRC-32 of a record, begun with its position: one that lies in another's place is damaged too. 4 us for 23 KiB."""
    return zlib.crc32(record, position)
