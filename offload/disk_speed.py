"""How fast the disk of a file is, read as streamed weights are: large direct reads into huge pages."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgert.memory.profile import DiskSpeed
from offload.arena import Arena
from offload.direct_file import ALIGN_BYTES, DirectFile
from offload.readers import Read, Readers

# As many threads, and pieces about as large, as streamed weights are read with (offload/window.py).
_N_THREADS, _PIECE_BYTES, _N_SLOTS = 4, 8 * 2**20, 8
_N_LATENCIES = 24


def disk_key(path: Path) -> str:
    """What tells the file's disk from others, as long as the system keeps its numbers."""
    device = path.stat().st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def measure_disk(path: Path, seconds: float) -> DiskSpeed:
    """Read the file round and round for about `seconds`. Memory held: 64 MiB. Raises what reading raises."""
    with _opened(path, _N_THREADS) as (file, readers, arena):
        latency_s = _latency(file, readers, arena)
        return DiskSpeed(_bandwidth(file, readers, arena, seconds), latency_s)


def measure_bandwidth(path: Path, n_threads: int, seconds: float) -> float:
    """Bytes/s with so many threads. Memory held and errors as above."""
    with _opened(path, n_threads) as (file, readers, arena):
        return _bandwidth(file, readers, arena, seconds)


@contextmanager
def _opened(path: Path, n_threads: int) -> Iterator[tuple[DirectFile, Readers, Arena]]:
    file, readers, arena = DirectFile(path), Readers(n_threads), Arena(_N_SLOTS * _PIECE_BYTES)
    try:
        yield file, readers, arena
    finally:
        readers.close(arena)
        file.close()
        arena.close()


def _bandwidth(file: DirectFile, readers: Readers, arena: Arena, seconds: float) -> float:
    n_pieces = max(1, file.size_bytes // _PIECE_BYTES)
    n_bytes = min(_PIECE_BYTES, -(-file.size_bytes // ALIGN_BYTES) * ALIGN_BYTES)
    reads: list[Read] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        number = len(reads)
        if number >= _N_SLOTS:
            reads[number - _N_SLOTS].wait(lambda: False)
        slot = arena.base + number % _N_SLOTS * _PIECE_BYTES
        reads.append(Read(file, number % n_pieces * _PIECE_BYTES, n_bytes, slot))
        readers.submit(reads[-1])
    for read in reads:
        read.wait(lambda: False)
    return len(reads) * n_bytes / (time.perf_counter() - start)


def _latency(file: DirectFile, readers: Readers, arena: Arena) -> float:
    """Median seconds of the smallest reads at places of no order, with the thread's turn that each takes."""
    places, times = random.Random(0), []
    for _ in range(_N_LATENCIES):
        offset = places.randrange(max(1, file.size_bytes // ALIGN_BYTES)) * ALIGN_BYTES
        start = time.perf_counter()
        read = Read(file, offset, ALIGN_BYTES, arena.base)
        readers.submit(read)
        read.wait(lambda: False)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
