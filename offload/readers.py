"""Threads that carry out reads, first asked first served.

Reads of 1-4 MiB from a few threads reach the disk's speed; `os.preadv` lets go of the interpreter's lock meanwhile.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edgert.errors import ComputeError
from edgert.ggml.backend import Cancelled
from offload.direct_file import ALIGN_BYTES, DirectFile

# One request of 2 MiB: large enough for the disk, small enough that four threads share a tensor.
CHUNK_BYTES = 2 * 2**20
# A slow disk gets smaller requests, so that `close` need not wait: at 50 MB/s four of 2 MiB take 170 ms.
_LEAST_REQUEST_BYTES, _SLOW_REQUEST_S = 2**18, 0.02
_CANCEL_POLL_S = 0.02
_DEADLINE_S = 120.0  # a throttled SD card reads a 32 MiB piece in seconds; beyond this the disk is gone
_CLOSE_DEADLINE_S = 10.0  # four chunks from a disk of 1 MB/s


class Latch:
    """Closed until `set`, once and for all. A tenth of what `threading.Event` costs, which is 2 us before it waits: a
    token may take 200 reads."""

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set, self._lock = False, threading.Lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._lock.release()  # and again by each who waits

    def wait(self, timeout_s: float) -> bool:
        """Until it is set, or for so long. Whether it is."""
        if not self._is_set and self._lock.acquire(timeout=timeout_s):
            self._lock.release()
        return self._is_set


@dataclass(slots=True, eq=False)
class Read:
    """One piece on its way into memory."""

    file: DirectFile
    offset: int
    n_bytes: int
    address: int
    shift_bytes: int = 0  # move the bytes so far down once they are all there
    n_chunks_left: int = 0
    abandoned: bool = False  # nobody wants it any more: chunks that have not begun are skipped
    error: Exception | None = None
    done: Latch = field(default_factory=Latch)

    @property
    def is_useless(self) -> bool:
        """The bytes are not there and will not come."""
        return self.abandoned or self.error is not None

    def wait(self, is_cancelled: Callable[[], bool]) -> float:
        """Until the bytes are there. Seconds waited.

        Raises what the read raised, Cancelled soon after `is_cancelled`, ComputeError past the deadline.
        """
        start = time.perf_counter()
        self.settle(is_cancelled)
        if self.error is not None:
            raise self.error
        if self.abandoned:
            raise AssertionError("waiting for bytes that nobody wanted")
        return time.perf_counter() - start

    def settle(self, is_cancelled: Callable[[], bool]) -> None:
        """Until no reader touches the memory any more, whatever became of the bytes. Raises Cancelled, ComputeError."""
        # The deadline counts waits, not the clock: a process that was suspended has not waited for the disk.
        n_waits = 0
        while not self.done.wait(_CANCEL_POLL_S):
            if is_cancelled():
                raise Cancelled
            n_waits += 1
            if n_waits * _CANCEL_POLL_S > _DEADLINE_S:
                raise ComputeError(f"{self.file.path}: the disk has not answered for {_DEADLINE_S:.0f} s",
                                   "Check the disk; the answer so far is right.")


class Readers:
    """`n_threads` threads over one queue. `close` ends them after the request that each is at."""

    def __init__(self, n_threads: int = 4) -> None:
        self._queue: queue.SimpleQueue[tuple[Read, int, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closing, self._may_begin = False, threading.Event()
        self._may_begin.set()
        self._memory: object = None
        self._request_bytes = CHUNK_BYTES
        self.bytes_read = 0
        self._threads = [threading.Thread(target=self._work, name=f"read-{i}", daemon=True) for i in range(n_threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, read: Read) -> None:
        """Cut the read into chunks and queue them. The caller bounds how much is under way: the window does."""
        if self._is_closing or read.n_bytes <= 0:
            raise AssertionError("the readers are closed" if self._is_closing else f"{read.n_bytes} bytes to read")
        starts = range(0, read.n_bytes, CHUNK_BYTES)
        read.n_chunks_left = len(starts)
        for start in starts:
            self._queue.put((read, start, min(CHUNK_BYTES, read.n_bytes - start)))

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """No request begins meanwhile: who reads little, and waits for it, finds the disk idle."""
        self._may_begin.clear()
        try:
            yield
        finally:
            self._may_begin.set()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            read, start, n_bytes = job
            n_read = 0
            try:
                n_read = self._carry_out(read, start, n_bytes)
            except Exception as error:  # whatever it is, it belongs to the one who waits
                read.error = error
            with self._lock:
                self.bytes_read += n_read
                read.n_chunks_left -= 1
                is_last = read.n_chunks_left == 0
            if is_last:
                if read.shift_bytes and not read.is_useless:
                    ctypes.memmove(read.address, read.address + read.shift_bytes, read.n_bytes - read.shift_bytes)
                read.done.set()

    def _carry_out(self, read: Read, start: int, n_bytes: int) -> int:
        """Read a chunk, in several requests if the disk is slow. Bytes read: fewer once nobody wants them."""
        n_read = 0
        while n_read < n_bytes:
            self._may_begin.wait()
            read.abandoned |= self._is_closing
            if read.is_useless:
                break
            n = min(self._request_bytes, n_bytes - n_read)
            begin = time.perf_counter()
            read.file.read_into(read.address + start + n_read, read.offset + start + n_read, n)
            self._adapt(n, time.perf_counter() - begin)
            n_read += n
        return n_read

    def _adapt(self, n_bytes: int, time_s: float) -> None:
        """Make requests smaller where one has taken long, and larger where one of that size would not have."""
        if time_s > _SLOW_REQUEST_S:
            self._request_bytes = max(_LEAST_REQUEST_BYTES, n_bytes // 2 // ALIGN_BYTES * ALIGN_BYTES)
        elif n_bytes == self._request_bytes and time_s < _SLOW_REQUEST_S / 4:
            self._request_bytes = min(CHUNK_BYTES, 2 * n_bytes)

    def close(self, memory: object = None) -> bool:
        """End the threads, each after the request that it is at; what is queued is forgotten. False when the disk keeps
        one of them past the deadline: the files must then stay open, and `memory`, where they read to, lives on."""
        self._is_closing, self._memory = True, memory
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.perf_counter() + _CLOSE_DEADLINE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.perf_counter()))
        return not any(thread.is_alive() for thread in self._threads)


def aligned_range(offset: int, n_bytes: int) -> tuple[int, int]:
    """The enclosing range that a direct read needs: (offset, n_bytes), multiples of ALIGN_BYTES."""
    start = offset // ALIGN_BYTES * ALIGN_BYTES
    end = -(-(offset + n_bytes) // ALIGN_BYTES) * ALIGN_BYTES
    return start, end - start
