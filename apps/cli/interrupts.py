"""Ctrl-C and SIGTERM: an answer that is being made stops at once and is kept; anything else ends as Python ends it.

Python runs signal handlers between bytecodes, so not while ggml computes a long prefill. The signal's number also goes
into a pipe, where a thread of its own waits and cancels. Knows nothing of what it cancels.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Programs that start us may pass the terminal's Ctrl-C on, so that one press comes twice.
SAME_PRESS_S = 0.25
# How long a signal may go unnoticed at a prompt before it is sent again.
_RESEND_AFTER_S = 0.05


class Terminated(BaseException):
    """SIGTERM came when no answer was being made."""


def exit_status(number: int) -> int:
    """The status of a process that a signal has stopped, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


class Interrupts:
    """Owns the two signals while it is open (main thread only), and a thread that ends with it.

    While an answer is being made (`stopping`), the first signal cancels it and the next one ends the process. At
    other times Ctrl-C raises KeyboardInterrupt and SIGTERM raises Terminated. A signal that was ignored stays so.

    Python drops what is raised inside a callback from C or a destructor (loading a model has both), so whoever goes on
    calls `raise_missed`; whoever catches KeyboardInterrupt and goes on calls `forget`.
    """

    def __init__(self, end_process: Callable[[int], Any] = os._exit,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.stopped_by: int | None = None  # the signal that cancelled the answer
        self._raised: int | None = None  # the signal whose exception is on its way, or was dropped
        self._cancel: Callable[[], None] | None = None
        self._asked_at_s: float | None = None
        self._n_waits, self._wait = 0, 0  # the number of the wait that goes on, 0 where none does
        self._n_resent = 0
        self._end_process, self._clock = end_process, clock

    def raise_missed(self) -> None:
        """Raise KeyboardInterrupt or Terminated if such a signal came and its exception was dropped."""
        if self._raised == signal.SIGTERM:
            raise Terminated
        if self._raised is not None:
            raise KeyboardInterrupt

    def forget(self) -> None:
        """The exception has arrived, and the program goes on."""
        self._raised = None

    @contextmanager
    def stopping(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Let signals call `cancel`, from another thread and perhaps twice, until the block ends."""
        self.stopped_by, self._asked_at_s, self._cancel = None, None, cancel
        try:
            self.raise_missed()
            yield
        finally:
            self._cancel = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let a signal end what waits in C for a person, such as `input`.

        Python looks for signals when the wait is interrupted. One that comes after its last look and before the wait
        interrupts nothing: the thread then sends it again.
        """
        self._n_waits += 1
        self._wait = self._n_waits
        try:
            yield
        finally:
            self._wait = 0

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        cancel = self._cancel
        if cancel is not None:  # the thread may have looked before there was anything to cancel
            self.stopped_by = self.stopped_by or number
            cancel()
        else:
            self._raised = number
            self.raise_missed()

    def _watch(self) -> None:
        while numbers := os.read(self._reader, 64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if self._n_resent:  # our own
                    self._n_resent -= 1
                elif self._cancel is not None:
                    self._stop(number, self._cancel)
                else:
                    self._resend(number, self._wait)

    def _stop(self, number: int, cancel: Callable[[], None]) -> None:
        if self._asked_at_s is None:
            self._asked_at_s = self._clock()
            self.stopped_by = number
            cancel()
        elif self._clock() - self._asked_at_s > SAME_PRESS_S:
            self._end_process(exit_status(number))

    def _resend(self, number: int, wait: int) -> None:
        """Send a signal again if the wait that it was to end still goes on."""
        if not wait:
            return
        time.sleep(_RESEND_AFTER_S)
        if self._wait == wait:
            self._n_resent += 1
            signal.pthread_kill(self._main_thread, number)

    def __enter__(self) -> Self:
        self._main_thread = threading.get_ident()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)  # a signal handler must not wait
        self._watcher = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        self._watcher.start()
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, self._on_signal) for number in SIGNALS
                                 if signal.getsignal(number) is not signal.SIG_IGN}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writer)  # the thread reads the end of the stream
        self._watcher.join()
        os.close(self._reader)
