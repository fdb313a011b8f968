"""A few threads that carry out what is submitted, first asked first served, and that end within a deadline.

A disk may never answer. Threads of concurrent.futures are waited for when the interpreter ends, however long; these are
not.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout

from edgert.errors import DiskSilent, KVStoreError

_POLL_S, _DEADLINE_S = 0.02, 120.0
_CLOSE_DEADLINE_S = 10.0  # a few records from a disk of 10 KB/s


class Workers:
    """The caller bounds how much is under way. `close` ends the threads after what each is at."""

    def __init__(self, n_threads: int, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._is_closing = self._is_silent = False
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(n_threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Raises DiskSilent like `check`."""
        if self._is_closing:
            raise AssertionError("the workers are closed")
        self.check()
        future: Future[None] = Future()
        self._queue.put((future, work))
        return future

    def check(self) -> None:
        """Raises DiskSilent where once a wait was given up: a thread still has that memory, and may write into it
        whenever its disk answers."""
        if self._is_silent:
            raise DiskSilent("the KV store", _DEADLINE_S)

    def wait(self, futures: list[Future[None]]) -> None:
        """Until all have ended, and no thread touches their memory any more; empties the list. Raises what the first of
        them raised; DiskSilent past a deadline, and from then on."""
        problem: Exception | None = None
        n_waits = 0
        while futures:
            try:
                futures[0].result(_POLL_S)
            except FutureTimeout:
                self.check()
                n_waits += 1
                if n_waits * _POLL_S > _DEADLINE_S:
                    self._is_silent = True
                    self.check()
                continue
            except CancelledError:
                problem = problem or KVStoreError("the KV store", "was closed")
            except Exception as error:  # of a reader: it belongs to the one who waits
                problem = problem or error
            futures.pop(0)
        if problem is not None:
            raise problem

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            future, work = job
            if self._is_closing:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                try:
                    work()
                except BaseException as error:  # whatever it is, it belongs to the one who waits
                    future.set_exception(error)
                else:
                    future.set_result(None)

    def close(self, deadline_s: float | None = None) -> bool:
        """End the threads; what is queued is forgotten. False when one is still at something past the deadline: the
        memory and the files that it uses must then stay."""
        self._is_closing = True
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.perf_counter() + (_CLOSE_DEADLINE_S if deadline_s is None else deadline_s)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.perf_counter()))
        return not any(thread.is_alive() for thread in self._threads)
