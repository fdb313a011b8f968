"""A worker as its leader sees it: connected, measured, given its slice."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from edgert.errors import ClusterError, EdgertError, PeerLost
from edgert.version import VERSION
from tensorpar.frames import MAX_DATA_BYTES, BadFrame, Kind, Moment
from tensorpar.identity import Identity
from tensorpar.link import Link
from tensorpar.members import Member
from tensorpar.messages import Setup, text, whole
from tensorpar.profile import Profile
from tensorpar.pulse import Pulse
from tensorpar.slice_file import SliceFile

_DIAL_S, _GREETING_S = 3.0, 10.0
_PROBE_BYTES, _LARGE_BYTES = 64, 2**20
# Small frames in some rounds with a pause between: one round alone may meet a busy moment (the other side has just
# opened a connection), and then all of it does.
_N_ROUNDS, _N_PROBES, _PAUSE_S = 4, 9, 0.015
# Writing a slice, opening it and repacking it, on a slow card: a Raspberry Pi takes minutes for 4 GiB.
_SET_UP_S = 1800.0


class Peer:
    """One connected worker. Used by one thread at a time."""

    def __init__(self, member: Member, link: Link, pulse: Pulse, hello: dict[str, Any]) -> None:
        self.member, self.link, self._pulse = member, link, pulse
        try:
            self.profile = Profile.of_message(hello.get("profile"))
        except ValueError as error:
            raise BadFrame(str(error)) from error
        self.version = text(hello, "version", 20)
        self.latency_s, self.bytes_per_s = 1e-4, 1e9
        self.sent_slice_bytes = 0
        link.check_alive = pulse.check

    @classmethod
    def connect(cls, member: Member, identity: Identity, session: str, addresses: Iterable[tuple[str, int]],
                interrupted: Callable[[], None]) -> Peer:
        """Dial the worker at the first of its addresses that answers. Raises ClusterError with the last reason."""
        problem = ClusterError(f"nobody knows where {member.name} is", "Name its address with --peer HOST:PORT.")
        for host, port in addresses:
            try:
                return cls._connect_at(host, port, member, identity, session, interrupted)
            except ClusterError as error:
                problem = error
        raise problem

    @classmethod
    def _connect_at(cls, host: str, port: int, member: Member, identity: Identity, session: str,
                    interrupted: Callable[[], None]) -> Peer:
        link = Link(identity.dial(host, port, member.certificate, _DIAL_S), interrupted=interrupted)
        try:
            link.send_message(Kind.HELLO, {"purpose": "work", "session": session}, within_s=_GREETING_S)
            _, hello = link.receive_message(Kind.READY, within_s=_GREETING_S)
            if text(hello, "version", 20) != VERSION:
                raise ClusterError(f"{member.name} has edgert {text(hello, 'version', 20)}, this is "
                                   f"{VERSION}", "Install the same version on both.")
            beat = identity.dial(host, port, member.certificate, _DIAL_S)
            Link(beat).send_message(Kind.HELLO, {"purpose": "pulse", "session": session}, within_s=_GREETING_S)
            peer = cls(member, link, Pulse(beat, 0), hello)
        except BaseException:
            link.close()
            raise
        peer.measure()
        return peer

    def assign(self, rank: int) -> None:
        self.link.rank = self._pulse.rank = rank

    def measure(self) -> None:
        """Latency and bandwidth of the link: small frames there and back, then a large one."""
        rounds = []
        for _ in range(_N_ROUNDS):
            rounds.append(statistics.median(self._round_trip_s(_PROBE_BYTES) for _ in range(_N_PROBES)))
            time.sleep(_PAUSE_S)
        self.latency_s = min(rounds) / 2
        large_s = min(self._round_trip_s(_LARGE_BYTES) for _ in range(2))
        self.bytes_per_s = 2 * _LARGE_BYTES / max(large_s - 2 * self.latency_s, 1e-6)

    def _round_trip_s(self, n_bytes: int) -> float:
        payload = memoryview(bytearray(n_bytes))
        began_s = time.perf_counter()
        self.link.send(Kind.PROBE, Moment(0), payload, _GREETING_S)
        if self.link.peek(n_bytes, _GREETING_S).kind is not Kind.PROBE:
            raise BadFrame("no echo")
        self.link.take(payload, _GREETING_S)
        return time.perf_counter() - began_s

    def flush(self) -> None:
        """Read away what a pass that was broken off has left: both sides might else wait for a full buffer."""
        self.link.send(Kind.PROBE, Moment(0), bytes(_PROBE_BYTES), _GREETING_S)
        while self.link.peek(MAX_DATA_BYTES).kind in (Kind.PART, Kind.SUM):
            self.link.skip(MAX_DATA_BYTES)
        if self.link.peek(_PROBE_BYTES).kind is not Kind.PROBE:
            raise PeerLost(self.link.rank, "it is out of step")
        self.link.skip(_PROBE_BYTES)

    def set_up(self, setup: Setup, slice_file: SliceFile, notice: Callable[[str], None]) -> None:
        """Give the worker its part: what it lacks of the slice, then wait until it stands. Raises PeerLost where it
        cannot do it, for whatever reason."""
        self.link.send_message(Kind.SETUP, setup.to_dict())
        received = whole(self._answer(), "received", 0, setup.slice_bytes)
        if received < setup.slice_bytes:
            notice(f"sending {self.member.name} its {(setup.slice_bytes - received) / 2**20:,.0f} MiB of the model")
            self._send_slice(slice_file, received)
        if whole(self._answer(), "epoch", 0, 2**31) != setup.epoch:
            raise BadFrame("another epoch")

    def _send_slice(self, slice_file: SliceFile, received: int) -> None:
        """Everything is hashed, and what is missing is sent."""
        digest, position = hashlib.sha256(), 0
        for chunk in slice_file.chunks():
            digest.update(chunk)
            missing = memoryview(chunk)[max(0, received - position):]
            position += len(chunk)
            if missing:
                self.link.send(Kind.CHUNK, Moment(0), missing)
                self.sent_slice_bytes += len(missing)
        self.link.send_message(Kind.READY, {"sha256": digest.hexdigest()})

    def _answer(self) -> dict[str, Any]:
        """The worker's READY. What an abandoned pass left before it is dropped."""
        while (header := self.link.peek(MAX_DATA_BYTES, _SET_UP_S)).kind in (Kind.PART, Kind.SUM):
            self.link.skip(MAX_DATA_BYTES)
        if header.kind is Kind.FAULT:
            _, fault = self.link.receive_message(Kind.FAULT)
            raise PeerLost(self.link.rank, text(fault, "problem") or "it cannot go on")
        return self.link.receive_message(Kind.READY, within_s=_SET_UP_S)[1]

    def close(self) -> None:
        self.link.close()
        self._pulse.close()


def ask_status(member: Member, identity: Identity, host: str, port: int) -> dict[str, Any]:
    """What a worker says about itself, and the round trip in `rtt_ms`. Raises ClusterError."""
    link = Link(identity.dial(host, port, member.certificate, _DIAL_S))
    try:
        began_s = time.perf_counter()
        link.send_message(Kind.HELLO, {"purpose": "status"}, within_s=_GREETING_S)
        _, status = link.receive_message(Kind.STATUS, within_s=_GREETING_S)
        return {**status, "rtt_ms": round((time.perf_counter() - began_s) * 1000, 2)}
    except EdgertError as error:
        raise ClusterError(f"{member.name}: {error.message}", error.next_step) from error
    finally:
        link.close()
