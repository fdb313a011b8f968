"""Frames and links: what is no frame is refused before memory is taken, and no wait is endless."""

from __future__ import annotations

import importlib.util
import socket
import struct
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from edgert.errors import PeerLost
from tensorpar.frames import HEADER_BYTES, VERSION, BadFrame, Header, Kind, Moment, pack, unpack
from tensorpar.link import Link, parse_message

N_FUZZ_CASES = 20_000


@pytest.fixture
def ends() -> Iterator[tuple[Link, socket.socket]]:
    """A link, and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(60)
    link = Link(ours, rank=3)
    yield link, theirs
    link.close()
    theirs.close()


def test_a_header_says_what_was_packed() -> None:
    moment = Moment(2, 2**32 - 1, 7)
    assert unpack(pack(Kind.PART, moment, 100), 100) == Header(Kind.PART, moment, 100)
    assert len(pack(Kind.PART, moment, 0)) == HEADER_BYTES == 24


@pytest.mark.parametrize(("damage", "problem"), [
    ((0, b"GET "), "magic"), ((4, bytes([VERSION + 1])), "version"), ((5, b"\0"), "kind"), ((5, b"\x40"), "kind"),
    ((6, b"\1"), "kind"), ((20, struct.pack("<I", 101)), "101 bytes announced, 100 are allowed"),
])
def test_what_is_no_frame_is_refused(damage: tuple[int, bytes], problem: str) -> None:
    raw = bytearray(pack(Kind.PART, Moment(1), 100))
    raw[damage[0]:damage[0] + len(damage[1])] = damage[1]
    with pytest.raises(BadFrame, match=problem):
        unpack(raw, 100)


@pytest.mark.parametrize("n_bytes", [0, 1, 2**16, 2**16 + 1, 2**20])
def test_a_frame_arrives_as_it_was_sent(n_bytes: int) -> None:
    a, b = (Link(one) for one in socket.socketpair())
    payload = bytes(range(256)) * (n_bytes // 256) + bytes(n_bytes % 256)
    sender = threading.Thread(target=a.send, args=(Kind.PART, Moment(1, 2, 3), payload))
    sender.start()
    assert b.peek(n_bytes) == b.peek(n_bytes) == Header(Kind.PART, Moment(1, 2, 3), n_bytes)
    into = bytearray(n_bytes)
    b.take(memoryview(into))
    sender.join(60)
    assert bytes(into) == payload
    a.close()
    b.close()


def test_a_closed_a_silent_and_a_dead_peer_are_lost(ends: tuple[Link, socket.socket]) -> None:
    link, theirs = ends
    with pytest.raises(PeerLost, match="in time") as silent:
        link.peek(within_s=0.01)
    assert silent.value.rank == 3

    def dead() -> None:
        raise PeerLost(3, "no pulse")

    link.check_alive = dead
    with pytest.raises(PeerLost, match="no pulse"):
        link.peek()
    link.check_alive = lambda: None
    theirs.sendall(pack(Kind.PART, Moment(1), 50)[:10])
    theirs.close()
    with pytest.raises(PeerLost, match="closed"):
        link.peek()


def test_a_wait_is_interrupted_between_frames_only(ends: tuple[Link, socket.socket]) -> None:
    link, theirs = ends
    link.is_due = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        link.peek()
    frame = pack(Kind.PROBE, Moment(0), 4) + b"done"
    theirs.sendall(frame[:5])
    timer = threading.Timer(0.12, theirs.sendall, [frame[5:]])  # more than two of the link's looks
    timer.start()
    into = bytearray(4)
    link.take(memoryview(into))
    assert into == b"done"
    timer.join(60)


@pytest.mark.parametrize("n_bytes", [5, HEADER_BYTES + 2])
def test_a_frame_that_stops_in_its_middle_is_not_waited_for(ends: tuple[Link, socket.socket], n_bytes: int) -> None:
    link, theirs = ends
    link.stall_s = 0.05
    theirs.sendall((pack(Kind.PART, Moment(1), 4) + b"half")[:n_bytes])
    with pytest.raises(PeerLost, match="in time"):
        link.take(memoryview(bytearray(4)))


def test_a_frame_that_is_due_is_not_waited_for_any_longer(ends: tuple[Link, socket.socket]) -> None:
    link, theirs = ends
    link.stall_s = 0.15
    answers = iter([False] * 5 + [True] * 1000)
    link.is_due = lambda: next(answers)
    timer = threading.Timer(0.35, theirs.sendall, [pack(Kind.PART, Moment(1), 0)])
    timer.start()  # five looks, for longer than a stall: what is not due may take as long as it likes
    assert link.peek(within_s=60).kind is Kind.PART
    link.take(memoryview(b""))
    timer.join(60)
    with pytest.raises(PeerLost, match="in time"):
        link.peek(within_s=60)


def test_who_is_far_away_is_not_asked_again_and_again(ends: tuple[Link, socket.socket],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    link, theirs = ends
    now_s, n_asked, comes_s = 0.0, 0, 0.0

    def pass_(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        if now_s >= comes_s:
            theirs.sendall(pack(Kind.PULSE, Moment(0), 0))

    def let_others() -> None:
        nonlocal n_asked
        n_asked += 1
        pass_(1e-5)

    def asked_in_a_wait_of(seconds: float) -> int:
        nonlocal comes_s, n_asked
        comes_s, n_asked = now_s + seconds, 0
        link.take(memoryview(b""))
        return n_asked

    monkeypatch.setattr("tensorpar.link.time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr("tensorpar.link._let_others", let_others)
    monkeypatch.setattr(link, "_ready", lambda event: pass_(comes_s - now_s) or True)
    assert all(asked_in_a_wait_of(1e-4) > 5 for _ in range(20))
    asked = [asked_in_a_wait_of(1e-3) for _ in range(20)]
    assert asked[0] > 20 and asked[10:] == [0] * 10
    assert asked_in_a_wait_of(1e-4) == 0 and asked_in_a_wait_of(1e-4) > 5  # near again, so it pays again


def test_a_peer_that_does_not_read_is_not_waited_for(ends: tuple[Link, socket.socket]) -> None:
    with pytest.raises(PeerLost, match="in time"):
        ends[0].send(Kind.PART, Moment(1), bytes(2**24), within_s=0.05)


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 5000, b'{"a":' * 40 + b"1" + b"}" * 40,
                                 b"{" + b"[]," * 9000 + b"}"])
def test_a_message_is_a_shallow_object(raw: bytes) -> None:
    with pytest.raises(BadFrame):
        parse_message(raw)


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz_frames.py"
    spec = importlib.util.spec_from_file_location("fuzz_frames", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_frames"] = module
    spec.loader.exec_module(module)
    return module


def test_damaged_frames_end_a_session_in_order(fuzz: ModuleType) -> None:
    assert fuzz.serve(b"".join(fuzz.sound_stream()))[0] == "it closed the connection"
    ends = {fuzz.run_case(7, number)[0] for number in range(N_FUZZ_CASES)}
    assert len(ends) > 10  # many different refusals, and no other exception


def test_a_pass_of_more_tokens_than_any_context_takes_no_memory(fuzz: ModuleType) -> None:
    probe, setup, *_ = fuzz.sound_stream()
    claim = b"".join(value.to_bytes(4, "little") for value in (0, 2**31, 1, 1, 2**32 - 1))
    tracemalloc.start()
    try:
        ended, peak_bytes = fuzz.serve(b"".join([probe, setup, fuzz.frame(Kind.PASS, Moment(1, 1), claim + bytes(64))]))
    finally:
        tracemalloc.stop()
    assert ended.startswith("a pass of 2147483648 tokens") and peak_bytes < 2**20
