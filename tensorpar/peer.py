"""A worker as its leader sees it: connected, measured, given its slice."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from edgert.errors import ClusterError, EdgertError, PeerLost
from edgert.version import VERSION
from tensorpar.collectives import Network
from tensorpar.frames import MAX_DATA_BYTES, BadFrame, Kind, Moment
from tensorpar.identity import Identity
from tensorpar.link import LONGEST_WAIT_S, Link
from tensorpar.members import Member
from tensorpar.messages import Introduction, Setup, number, text, whole
from tensorpar.probe import Speed, measure
from tensorpar.profile import Profile
from tensorpar.pulse import Pulse
from tensorpar.slice_file import SliceFile

_DIAL_S, _GREETING_S = 3.0, 10.0
_PROBE_BYTES = 64
# Writing a slice, opening it and repacking it, on a slow card: a Raspberry Pi takes minutes for 4 GiB.
_SET_UP_S = 1800.0


class Peer:
    """One connected worker. Used by one thread at a time."""

    def __init__(self, member: Member, host: str, port: int, link: Link, pulse: Pulse, hello: dict[str, Any]) -> None:
        self.member, self.host, self.port, self.link, self._pulse = member, host, port, link, pulse
        try:
            self.profile = Profile.of_message(hello.get("profile"))
        except ValueError as error:
            raise BadFrame(str(error)) from error
        self.version = text(hello, "version", 20)
        self.latency_s, self.bytes_per_s = 1e-4, 1e9
        self.sent_slice_bytes = 0
        link.check_alive = self.check_alive = pulse.check

    @classmethod
    def connect(cls, member: Member, identity: Identity, session: str, addresses: Iterable[tuple[str, int]],
                is_due: Callable[[], bool]) -> Peer:
        """Dial the worker at the first of its addresses that answers. Raises ClusterError with the last reason."""
        problem = ClusterError(f"nobody knows where {member.name} is", "Name its address with --peer HOST:PORT.")
        for host, port in addresses:
            try:
                return cls._connect_at(host, port, member, identity, session, is_due)
            except ClusterError as error:
                problem = error
        raise problem

    @classmethod
    def _connect_at(cls, host: str, port: int, member: Member, identity: Identity, session: str,
                    is_due: Callable[[], bool]) -> Peer:
        link = Link(identity.dial(host, port, member.certificate, _DIAL_S), is_due=is_due)
        try:
            link.send_message(Kind.HELLO, {"purpose": "work", "session": session}, within_s=_GREETING_S)
            _, hello = link.receive_message(Kind.READY, within_s=_GREETING_S)
            if text(hello, "version", 20) != VERSION:
                raise ClusterError(f"{member.name} has edgert {text(hello, 'version', 20)}, this is "
                                   f"{VERSION}", "Install the same version on both.")
            beat = identity.dial(host, port, member.certificate, _DIAL_S)
            Link(beat).send_message(Kind.HELLO, {"purpose": "pulse", "session": session}, within_s=_GREETING_S)
            peer = cls(member, host, port, link, Pulse(beat, 0), hello)
        except BaseException:
            link.close()
            raise
        peer.measure()
        return peer

    def assign(self, rank: int) -> None:
        self.link.rank = self._pulse.rank = rank

    def measure(self) -> None:
        """Latency and bandwidth of the link."""
        speed = measure(self.link)
        self.latency_s, self.bytes_per_s = speed.latency_s, speed.bytes_per_s

    def introduce(self, introduction: Introduction) -> None:
        """Tell the worker who the others are. Raises PeerLost."""
        self.link.send_message(Kind.MEET, introduction.to_dict())
        self._answer()

    def meet(self) -> Speed | None:
        """Once all know each other, let the worker connect to them; how quick its slowest link is, None where one does
        not come about. Raises PeerLost."""
        self.link.send_message(Kind.DIAL, {})
        answer = self._answer()
        return None if answer.get("problem") else Speed(number(answer, "latency_s"), number(answer, "bytes_per_s"))

    def agree(self, network: Network) -> None:
        self.link.send_message(Kind.AGREE, asdict(network))

    def flush(self) -> None:
        """Read away what a pass that was broken off has left: both sides might else wait for a full buffer."""
        self.link.send(Kind.PROBE, Moment(0), bytes(_PROBE_BYTES), _GREETING_S)
        self._skip_pass()
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
        self._skip_pass(_SET_UP_S)
        return self.link.receive_message(Kind.READY, within_s=_SET_UP_S)[1]

    def _skip_pass(self, within_s: float = LONGEST_WAIT_S) -> None:
        """Drop parts, sums, and word of links to other workers that broke. Raises PeerLost for any other fault."""
        while (header := self.link.peek(MAX_DATA_BYTES, within_s)).kind in (Kind.PART, Kind.SUM, Kind.FAULT):
            if header.kind is not Kind.FAULT:
                self.link.skip(MAX_DATA_BYTES)
                continue
            _, fault = self.link.receive_message(Kind.FAULT)
            if not fault.get("lost"):
                raise PeerLost(self.link.rank, text(fault, "problem") or "it cannot go on")

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
