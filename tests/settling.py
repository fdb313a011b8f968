"""What a process holds, once the system has counted it: a thread counts for a moment after it was joined."""

from __future__ import annotations

import time

import psutil

_DEADLINE_S, _POLL_S = 60, 0.01


def descriptors_and_threads() -> tuple[int, int]:
    process = psutil.Process()
    return process.num_fds(), process.num_threads()


def check_settles(n_descriptors: int, n_threads: int) -> None:
    """This process holds as many descriptors as given, and soon no more threads (fewer, where one counted before)."""
    deadline = time.monotonic() + _DEADLINE_S
    while descriptors_and_threads()[1] > n_threads and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    assert descriptors_and_threads()[0] == n_descriptors
    assert descriptors_and_threads()[1] <= n_threads
