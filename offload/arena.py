"""One region of memory for all streamed and pinned weights.

Private, anonymous, 2 MiB aligned, in huge pages, touched once. The destination decides the speed of a direct read:
into 4 KiB pages 0.8-1.2 GB/s, into 2 MiB pages 2.4-3.6 GB/s on the same disk, because a request then names few
segments. Shared memory (Python's default for anonymous maps) and heap memory are the slow case.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import numpy as np
from numpy.typing import NDArray

from edgert.errors import OutOfMemory

HUGE_PAGE_BYTES = 2 * 2**20
PAGE_BYTES = 4096


class Arena:
    """`size_bytes` of memory, carved from the front. Resident at once: a budget that does not fit fails here. But for
    the last `spare_bytes`, which take memory when they are written."""

    def __init__(self, size_bytes: int, spare_bytes: int = 0, *, huge_pages: bool = True) -> None:
        now_bytes = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        self.size_bytes = now_bytes + -(-spare_bytes // PAGE_BYTES) * PAGE_BYTES
        try:
            self._map = mmap.mmap(-1, self.size_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise OutOfMemory("the weights' arena", size_bytes, "Ask for a smaller --memory.") from error
        whole = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.base = -(-whole // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        self._used_bytes = 0
        start = self._start = self.base - whole
        with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages: slower, not wrong
            self._map.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE,
                              start // PAGE_BYTES * PAGE_BYTES, self.size_bytes)
        ctypes.memset(self.base, 0, now_bytes)

    @property
    def free_bytes(self) -> int:
        return self.size_bytes - self._used_bytes

    def carve(self, size_bytes: int) -> int:
        """The address of the next `size_bytes`, page aligned. They stay carved as long as the arena lives."""
        size = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        if size > self.free_bytes:
            raise AssertionError(f"{size} bytes asked, {self.free_bytes} left in the arena")
        address = self.base + self._used_bytes
        self._used_bytes += size
        return address

    def array(self) -> NDArray[np.uint8]:
        """All of it, to be written. Valid until `close`."""
        return np.frombuffer(memoryview((ctypes.c_uint8 * self.size_bytes).from_address(self.base)), np.uint8)

    def give_back(self, address: int, size_bytes: int) -> None:
        """Let the system have the pages of a carved range, page aligned. They read as zeros, and take memory again
        when they are written. Dear (the next read faults every page in): for pressure, not for every token."""
        with contextlib.suppress(OSError, AttributeError):  # a system without it: the memory stays ours
            self._map.madvise(mmap.MADV_DONTNEED, self._start + address - self.base, size_bytes)

    def close(self) -> None:
        """Give the memory back. Nothing may read or compute in it any more."""
        self._used_bytes = self.size_bytes
        with contextlib.suppress(BufferError):
            self._map.close()
