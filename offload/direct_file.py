"""Reading parts of a model file straight into memory of ours: positioned, whole or an error, of a file that stays."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
from pathlib import Path

from edgert.errors import ModelFileError
from edgert.uncached_file import METHODS, Method, UncachedFile

# Direct reads begin and end on multiples of the disk's logical block, 512 or 4096 bytes: the larger serves both.
ALIGN_BYTES = 4096
_log = logging.getLogger(__name__)


class DirectFile:
    """One file, opened for positioned reads. Safe from several threads."""

    def __init__(self, path: Path, methods: tuple[Method, ...] = METHODS) -> None:
        self.path = path
        try:
            self._file = UncachedFile(path, os.O_RDONLY, ALIGN_BYTES, methods=methods)
        except OSError as error:
            if error.errno == errno.EIO:
                raise ModelFileError(str(path), "cannot be read", "Check the disk.") from error
            raise ModelFileError(str(path), f"cannot be opened: {error.strerror}") from error
        self._version = _version(self._file.fd)
        self.size_bytes = self._version[0]
        _log.info("%s is read by %s", path, self.method)

    @property
    def method(self) -> Method:
        return self._file.method

    def read_into(self, address: int, offset: int, n_bytes: int) -> None:
        """Read `n_bytes` at `offset` to `address`; all three multiples of ALIGN_BYTES, but for the file's end.

        Raises ModelFileError for a failing disk, a short file, or a file that has changed since it was opened.
        """
        done, wanted = 0, min(n_bytes, self.size_bytes - offset)
        if wanted <= n_bytes - ALIGN_BYTES:
            raise self._problem()
        while done < wanted:
            view = memoryview((ctypes.c_char * (n_bytes - done)).from_address(address + done)).cast("B")
            try:
                n = self._file.read([view], offset + done)
            except OSError as error:
                raise self._problem(error) from error
            if n <= 0:
                raise self._problem()
            done += n
        self._file.forget(offset, n_bytes)

    def _problem(self, error: OSError | None = None) -> ModelFileError:
        """What a failed read means, or one that met the file's end. Behind a new end, some disks fail direct reads."""
        is_shorter = error is None
        with contextlib.suppress(OSError):
            is_shorter |= os.fstat(self._file.fd).st_size < self.size_bytes
        if error is not None and not is_shorter:
            return ModelFileError(str(self.path), f"reading failed: {error.strerror}",
                                  "Check the disk; the answer so far is right.")
        return ModelFileError(str(self.path), "the file has become shorter while it was in use",
                              "Start again with the whole file.")

    def check_unchanged(self) -> None:
        """Raises ModelFileError when the file was written to since it was opened. A file that was replaced or removed
        is read as it was."""
        try:
            unchanged = _version(self._file.fd) == self._version
        except OSError as error:
            raise self._problem(error) from error
        if not unchanged:
            raise ModelFileError(str(self.path), "the file has changed while it was in use",
                                 "Start again, so that the new file is read whole.")

    def close(self) -> None:
        self._file.close()


def forget_cached(path: Path, n_bytes: int = 0) -> None:
    """Let the page cache forget the first `n_bytes` of a file, or all of it, but for what is mapped: in a control group
    they count against the budget."""
    with contextlib.suppress(OSError, AttributeError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, n_bytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _version(fd: int) -> tuple[int, int]:
    """(size in bytes, time of the last write)."""
    stat = os.fstat(fd)
    return stat.st_size, stat.st_mtime_ns
