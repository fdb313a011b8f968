"""Reading parts of a file straight into memory of ours, past the page cache where the system lets us.

Three ways, the first that works: O_DIRECT (the disk writes into our pages), RWF_DONTCACHE (Linux 6.14: through the
page cache, dropped at once), buffered with posix_fadvise. A probe read decides, since some file systems accept the
flag and refuse the read.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
from pathlib import Path
from typing import Literal

from edgert.errors import ModelFileError

Method = Literal["direct", "dontcache", "buffered"]
# Direct reads begin and end on multiples of the disk's logical block, 512 or 4096 bytes: the larger serves both.
ALIGN_BYTES = 4096
_RWF_DONTCACHE = 0x80
_log = logging.getLogger(__name__)


class DirectFile:
    """One file, opened for positioned reads. Safe from several threads."""

    def __init__(self, path: Path, methods: tuple[Method, ...] = ("direct", "dontcache", "buffered")) -> None:
        self.path = path
        self._fd = -1
        for method in methods:
            self._open(method)
            if self._probe():
                self.method: Method = method
                break
            self.close()
        else:
            raise ModelFileError(str(path), "cannot be read", "Check the disk.")
        self._version = _version(self._fd)
        self.size_bytes = self._version[0]
        _log.info("%s is read by %s", path, self.method)

    def _open(self, method: Method) -> None:
        self._flags = _RWF_DONTCACHE if method == "dontcache" else 0
        extra = getattr(os, "O_DIRECT", 0) if method == "direct" else 0
        self.method = method
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | extra)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: the file system knows no O_DIRECT
                raise ModelFileError(str(self.path), f"cannot be opened: {error.strerror}") from error
            self._fd = -1

    def _probe(self) -> bool:
        if self._fd < 0 or (self.method == "direct" and not hasattr(os, "O_DIRECT")):
            return False
        with mmap.mmap(-1, ALIGN_BYTES) as page:
            try:
                return os.preadv(self._fd, [page], 0, self._flags) > 0
            except OSError:
                return False

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
                n = os.preadv(self._fd, [view], offset + done, self._flags)
            except OSError as error:
                raise self._problem(error) from error
            if n <= 0:
                raise self._problem()
            done += n
        if self.method == "buffered":
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, offset, n_bytes, os.POSIX_FADV_DONTNEED)

    def _problem(self, error: OSError | None = None) -> ModelFileError:
        """What a failed read means, or one that met the file's end. Behind a new end, some disks fail direct reads."""
        is_shorter = error is None
        with contextlib.suppress(OSError):
            is_shorter |= os.fstat(self._fd).st_size < self.size_bytes
        if error is not None and not is_shorter:
            return ModelFileError(str(self.path), f"reading failed: {error.strerror}",
                                  "Check the disk; the answer so far is right.")
        return ModelFileError(str(self.path), "the file has become shorter while it was in use",
                              "Start again with the whole file.")

    def check_unchanged(self) -> None:
        """Raises ModelFileError when the file was written to since it was opened. A file that was replaced or removed
        is read as it was."""
        try:
            unchanged = _version(self._fd) == self._version
        except OSError as error:
            raise self._problem(error) from error
        if not unchanged:
            raise ModelFileError(str(self.path), "the file has changed while it was in use",
                                 "Start again, so that the new file is read whole.")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


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
