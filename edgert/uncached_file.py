"""A file that is read and written past the page cache where the system lets us: what is cached counts against a budget.

Three ways, the first that works: O_DIRECT (the disk moves our own pages), RWF_DONTCACHE (Linux 6.14: through the page
cache, dropped at once), buffered with posix_fadvise. A probe read decides, since some file systems accept the flag and
refuse the read. Knows no content and no errors but the system's.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

Method = Literal["direct", "dontcache", "buffered"]
METHODS: tuple[Method, ...] = ("direct", "dontcache", "buffered")
_RWF_DONTCACHE = 0x80
_Memory = Sequence[memoryview | mmap.mmap]


class UncachedFile:
    """One descriptor. Safe from several threads; direct requests begin and end on multiples of the disk's blocks."""

    def __init__(self, path: Path, flags: int, step_bytes: int, *, may_be_empty: bool = False,
                 methods: tuple[Method, ...] = METHODS) -> None:
        """`step_bytes` is the multiple that requests keep, in the file and in memory. Raises OSError: what opening it
        said, or EIO where no method reads."""
        self.fd = -1
        for self.method in methods:
            self._open(path, flags)
            if self.fd >= 0 and self._reads(step_bytes, may_be_empty):
                return
            self.close()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _open(self, path: Path, flags: int) -> None:
        is_direct = self.method == "direct"
        if is_direct and not hasattr(os, "O_DIRECT"):
            return
        self._flags = _RWF_DONTCACHE if self.method == "dontcache" else 0
        try:
            self.fd = os.open(path, flags | os.O_CLOEXEC | (os.O_DIRECT if is_direct else 0), 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL or not is_direct:  # EINVAL: the file system knows no O_DIRECT
                raise

    def _reads(self, step_bytes: int, may_be_empty: bool) -> bool:
        with mmap.mmap(-1, 2 * max(step_bytes, mmap.PAGESIZE)) as pages, memoryview(pages) as memory:
            try:
                with memory[step_bytes:2 * step_bytes] as step:
                    return self.read([step], step_bytes if may_be_empty else 0) > 0 or may_be_empty
            except OSError:
                return False

    def read(self, memory: _Memory, offset: int) -> int:
        """Bytes read, fewer than there is memory at the file's end. Raises OSError."""
        return os.preadv(self.fd, memory, offset, self._flags) if self._flags else os.preadv(self.fd, memory, offset)

    def write(self, memory: _Memory, offset: int) -> int:
        """Bytes written. Raises OSError."""
        return os.pwritev(self.fd, memory, offset, self._flags) if self._flags else os.pwritev(self.fd, memory, offset)

    def forget(self, offset: int, n_bytes: int) -> None:
        """Let the page cache forget what was read or written, where it went through it."""
        if self.method == "buffered":
            with contextlib.suppress(OSError, AttributeError):
                os.posix_fadvise(self.fd, offset, n_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
