"""Whether a model's file lies in the page cache, and how to forget it there: a run from a cold cache is another run."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path


def forget(paths: Sequence[Path]) -> None:
    """Let the system forget the pages of these files that nobody has mapped. Needs no rights; does nothing on
    systems that have no such call."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(paths: Sequence[Path]) -> None:
    """Read these files once."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def cached_share(paths: Sequence[Path]) -> float | None:
    """How much of these files is in memory, from 0 to 1; None where the system does not tell (mincore(2))."""
    n_pages = n_cached = 0
    for path in paths:
        size = path.stat().st_size
        count = -(-size // mmap.PAGESIZE)
        pages = _residency(path, size, count)
        if pages is None:
            return None
        n_pages, n_cached = n_pages + count, n_cached + sum(page & 1 for page in pages)
    return n_cached / n_pages if n_pages else None


def _residency(path: Path, size: int, count: int) -> bytes | None:
    """A byte for each page, whose lowest bit says whether it is in memory."""
    mincore = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
    if mincore is None or not size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE,
                                            prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        told = (ctypes.c_ubyte * count)()
        start = ctypes.c_char.from_buffer(mapped)  # writable only so that its address can be had
        address = ctypes.addressof(start)
        status = mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), told)
        del start
        return bytes(told) if status == 0 else None
