from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from apps.cli.interrupts import _RESEND_AFTER_S, SAME_PRESS_S, SIGNALS, Interrupts, Terminated

DEADLINE_S = 60.0


class Answer:
    """Something that can be cancelled, and tells when that came."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        if threading.current_thread().name == "interrupts":  # the main thread's handler cancels as well
            self.cancelled.set()


class Exit:
    """Stands for the end of the process."""

    def __init__(self) -> None:
        self.called = threading.Event()
        self.statuses: list[int] = []

    def __call__(self, status: int) -> None:
        self.statuses.append(status)
        self.called.set()


@pytest.fixture(autouse=True)
def everything_is_put_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "interrupts" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_cancels_the_answer_and_is_remembered(number: signal.Signals) -> None:
    answer = Answer()
    with Interrupts() as interrupts, interrupts.stopping(answer.cancel):
        signal.raise_signal(number)
        assert answer.cancelled.wait(DEADLINE_S)
        assert interrupts.stopped_by == number


def test_the_answer_is_cancelled_by_a_thread_that_does_not_wait_for_python() -> None:
    answer = Answer()
    with Interrupts() as interrupts, interrupts.stopping(answer.cancel):
        signal.signal(signal.SIGINT, lambda *_: None)  # as long as ggml computes, Python's handler does not run
        signal.raise_signal(signal.SIGINT)
        assert answer.cancelled.wait(DEADLINE_S)


def test_a_second_press_ends_the_process_but_a_signal_passed_on_twice_does_not() -> None:
    answer, end, now_s = Answer(), Exit(), [100.0]
    with Interrupts(end, lambda: now_s[0]) as interrupts, interrupts.stopping(answer.cancel):
        signal.raise_signal(signal.SIGINT)
        assert answer.cancelled.wait(DEADLINE_S)
        now_s[0] += SAME_PRESS_S / 2
        interrupts._stop(signal.SIGINT, answer.cancel)
        assert end.statuses == []
        now_s[0] += SAME_PRESS_S
        signal.raise_signal(signal.SIGINT)
        assert end.called.wait(DEADLINE_S)
        assert end.statuses == [130]


def test_every_answer_has_its_own_first_press() -> None:
    end = Exit()
    with Interrupts(end) as interrupts:
        for _ in range(3):
            answer = Answer()
            with interrupts.stopping(answer.cancel):
                assert interrupts.stopped_by is None
                signal.raise_signal(signal.SIGINT)
                assert answer.cancelled.wait(DEADLINE_S)
    assert end.statuses == []


def test_without_an_answer_the_signals_raise() -> None:
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupts.forget()
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)


def test_an_exception_that_python_dropped_is_raised_later() -> None:
    answer = Answer()
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):  # as a callback from C drops it
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_missed()
        with pytest.raises(KeyboardInterrupt), interrupts.stopping(answer.cancel):
            raise AssertionError("the answer must not begin")
        interrupts.forget()
        interrupts.raise_missed()


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_did_not_interrupt_a_wait_is_sent_again() -> None:
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.waiting():
            # What a signal leaves that comes between Python's last look and the wait in C: a byte, and nothing else.
            os.write(interrupts._writer, bytes([signal.SIGINT]))
            threading.Event().wait(DEADLINE_S)
        interrupts.forget()
        with interrupts.waiting():  # the one that was sent again ends no second wait
            threading.Event().wait(4 * _RESEND_AFTER_S)


def test_a_signal_is_not_sent_again_where_nothing_waits() -> None:
    with Interrupts() as interrupts:
        os.write(interrupts._writer, bytes([signal.SIGINT]))
        with interrupts.waiting():
            pass
        threading.Event().wait(4 * _RESEND_AFTER_S)
