"""Pairing: who knows the code gets in, nobody else, and three tries are all."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgert.errors import ClusterError, UsageError
from tensorpar import pairing
from tensorpar.frames import Kind, Moment
from tensorpar.identity import Identity
from tensorpar.link import Link
from tensorpar.members import Member
from tensorpar.words import new_code, parse_code

CODE = "7-otter-lamp"
DEADLINE_S = 60.0


@dataclass(slots=True)
class Door:
    """An invitation that waits in a thread, and how it ended."""

    server: socket.socket
    leader: Identity
    joiner: Identity
    outcome: Member | ClusterError | None = None

    def open(self) -> threading.Thread:
        thread = threading.Thread(target=self._wait)
        thread.start()
        return thread

    def _wait(self) -> None:
        try:
            self.outcome = pairing.invite(self.server, self.leader, "laptop", CODE)
        except ClusterError as error:
            self.outcome = error

    def dial(self) -> socket.socket:
        return socket.create_connection(self.server.getsockname(), DEADLINE_S)

    def join(self, code: str) -> Member:
        return pairing.join(self.dial(), self.joiner, "pi", 7441, code)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Door(server, Identity.load_or_create(tmp_path / "a", "laptop"),
                   Identity.load_or_create(tmp_path / "b", "pi"))


def test_both_sides_hold_the_others_certificate(door: Door) -> None:
    thread = door.open()
    leader = door.join(CODE)
    thread.join(DEADLINE_S)
    assert leader.certificate == door.leader.certificate
    assert door.outcome == Member("pi", door.joiner.certificate, "127.0.0.1", 7441)


def test_two_wrong_codes_and_then_the_right_one(door: Door) -> None:
    thread = door.open()
    for _ in range(2):
        with pytest.raises(pairing.WrongCode):
            door.join("7-otter-lemon")
    door.join(CODE)
    thread.join(DEADLINE_S)
    assert isinstance(door.outcome, Member)


def test_three_wrong_codes_close_the_door(door: Door) -> None:
    thread = door.open()
    for _ in range(3):
        with pytest.raises(pairing.WrongCode):
            door.join("8-otter-lamp")
    thread.join(DEADLINE_S)
    assert isinstance(door.outcome, ClusterError) and "three wrong codes" in door.outcome.message


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"EDGT" + b"\xff" * 60])
def test_who_talks_nonsense_costs_no_try(door: Door, said: bytes) -> None:
    thread = door.open()
    for _ in range(5):
        with door.dial() as nonsense, suppress(OSError):  # the door may shut before all is said
            nonsense.sendall(said)
            nonsense.shutdown(socket.SHUT_WR)
            assert nonsense.recv(100) == b""  # and learns nothing
    door.join(CODE)
    thread.join(DEADLINE_S)
    assert isinstance(door.outcome, Member)


def test_a_certificate_that_was_exchanged_on_the_way_is_noticed(door: Door) -> None:
    """Somebody in between passes everything on but puts his own certificate into the joiner's message."""
    thread, between = door.open(), Identity.load_or_create(door.leader.key_file.parent / "c", "between")
    listener = socket.create_server(("127.0.0.1", 0))

    def pass_on() -> None:
        inner, outer = Link(listener.accept()[0]), Link(door.dial())
        message = inner.receive_message(Kind.SPAKE)[1]
        outer.send_message(Kind.SPAKE, {**message, "certificate": between.certificate})
        inner.send_message(Kind.SPAKE, outer.receive_message(Kind.SPAKE)[1])
        proof = bytearray(32)
        inner.peek(32)
        inner.take(memoryview(proof))
        outer.send(Kind.CONFIRM, Moment(0), bytes(proof))
        with pytest.raises(ClusterError):
            outer.peek(32)
        inner.close()
        outer.close()

    middle = threading.Thread(target=pass_on)
    middle.start()
    with pytest.raises(pairing.WrongCode):
        pairing.join(socket.create_connection(listener.getsockname()), door.joiner, "pi", 7441, CODE)
    middle.join(DEADLINE_S)
    door.join(CODE)
    thread.join(DEADLINE_S)
    listener.close()
    assert isinstance(door.outcome, Member) and door.outcome.certificate == door.joiner.certificate


def test_what_a_listener_has_heard_is_of_no_use(door: Door) -> None:
    """A recorded conversation is played again: the other side's part of the key is new."""
    said: list[bytes] = []

    class Recording(Link):
        def send(self, kind: Kind, moment: Moment, payload: memoryview | bytes = b"", within_s: float = 60) -> None:
            said.append(bytes(payload))
            super().send(kind, moment, payload, within_s)

    thread = door.open()
    pairing._Exchange(Recording(door.dial()), door.joiner, "pi", 7441).join(CODE, "")
    thread.join(DEADLINE_S)
    thread, replay = door.open(), Link(door.dial())
    replay.send(Kind.SPAKE, Moment(0), said[0])
    replay.receive_message(Kind.SPAKE)
    replay.send(Kind.CONFIRM, Moment(0), said[1])
    with pytest.raises(ClusterError):
        replay.peek(32)
    replay.close()
    door.join(CODE)
    thread.join(DEADLINE_S)


@pytest.mark.parametrize("change", [{"certificate": "x"}, {"certificate": None}, {"name": "\n"}, {"name": "x" * 100},
                                    {"port": -1}, {"port": "7"}, {"spake": "zz"}, {"spake": "00" * 33}])
def test_a_greeting_with_a_lie_is_refused(door: Door, change: dict[str, object]) -> None:
    thread, link = door.open(), Link(door.dial())
    message = {"spake": "00", "certificate": door.joiner.certificate, "name": "pi", "port": 1, **change}
    link.send_message(Kind.SPAKE, json.loads(json.dumps(message)))
    with pytest.raises(ClusterError):
        for _ in range(2):
            link.peek(2**13, DEADLINE_S)
            link.skip(2**13)
    link.close()
    door.join(CODE)
    thread.join(DEADLINE_S)
    assert isinstance(door.outcome, Member)


def test_an_invitation_ends_after_two_minutes(door: Door) -> None:
    times = iter([0.0, 121.0])
    with pytest.raises(ClusterError, match="two minutes"):
        pairing.invite(door.server, door.leader, "laptop", CODE, clock=lambda: next(times))


def test_codes_are_read_as_people_type_them() -> None:
    assert parse_code("  7 Otter-LAMP ") == CODE
    assert len({parse_code(new_code()) for _ in range(200)}) > 190
    for wrong in ("", "7-otter", "0-otter-lamp", "7-otter-otter", "7-otter-lamp-x", "7-\u043etter-lamp"):
        with pytest.raises(UsageError):
            parse_code(wrong)
