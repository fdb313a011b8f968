"""Heartbeats: who ends is noticed at once, who falls silent soon, and one's own sleep is held against nobody."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest

from edgert.errors import PeerLost
from tensorpar import pulse
from tensorpar.frames import Kind, Moment, pack

DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "EVERY_S", 0.01)
    monkeypatch.setattr(pulse, "SILENT_AFTER_S", 0.2)


def reason(one: pulse.Pulse) -> str:
    """Why it counts as lost, once it does."""
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        try:
            one.check()
        except PeerLost as lost:
            return lost.why
        time.sleep(0.005)
    raise AssertionError("it was never lost")


def test_two_that_live_hear_each_other() -> None:
    a, b = socket.socketpair()
    both = pulse.Pulse(a, 1), pulse.Pulse(b, 0)
    seen = [one._seen_s for one in both]
    deadline_s = time.monotonic() + DEADLINE_S
    while any(one._seen_s == before for one, before in zip(both, seen, strict=True)):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    both[0].close()
    assert "nothing was heard" not in reason(both[1])
    both[1].close()


def test_who_says_nothing_or_nonsense_is_lost() -> None:
    for said, expected in ((b"", "nothing was heard"), (b"\0" * 24, "magic"),
                           (pack(Kind.HELLO, Moment(0), 0), "heartbeat")):
        a, b = socket.socketpair()
        one = pulse.Pulse(a, 1)
        b.sendall(said)
        assert expected in reason(one)
        one.close()
        b.close()


def test_its_own_sleep_is_held_against_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = socket.socketpair()
    one = pulse.Pulse(a, 1)
    one._closed.set()  # its thread runs no more, as if this process had been stopped
    one._thread.join(DEADLINE_S)
    offset_s = [0.0]
    clock: Callable[[], float] = time.monotonic
    monkeypatch.setattr(pulse.time, "monotonic", lambda: clock() + offset_s[0])
    offset_s[0] = 100.0
    one.check()
    one._awake_s = pulse.time.monotonic()
    with pytest.raises(PeerLost, match="nothing was heard"):
        one.check()
    one.close()
    b.close()
