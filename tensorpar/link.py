"""One connection to one other device: whole frames, every wait with a deadline.

Knows sockets, plain or TLS, and nothing of what frames mean. Used by one thread at a time.
"""

from __future__ import annotations

import json
import os
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

from edgert.errors import PeerLost
from tensorpar.frames import HEADER_BYTES, MAX_MESSAGE_BYTES, BadFrame, Header, Kind, Moment, pack, unpack

# How often a wait looks whether the other side is still alive: half of the 100 ms in which a death is to be seen.
_LOOK_EVERY_MS = 50
# For so long a wait asks again and again before it sleeps: what comes soon then comes 30-60 us sooner, the time that
# a sleeping core takes to wake. Between two questions, whoever else wants the core may have it. After some waits in a
# row that lasted longer, what comes is far away, and asking takes the core from ranks and programs that need it.
SPIN_S, _MAX_SPUN_IN_VAIN = 3e-4, 4
_let_others: Callable[[], None] = getattr(os, "sched_yield", lambda: None)  # not every Unix has it
_NOT_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
# A computation of one block of the largest batch on the slowest device; silence is noticed long before (pulse.py).
LONGEST_WAIT_S = 300.0
# Up to this size header and payload are one write, and one packet where they fit.
_JOINED_BYTES = 2**16
_BUFFER_BYTES = 2**20
_MAX_DEPTH = 32


class Link:
    """Frames to and from the device of `rank`. `check_alive` raises when that device is known to be gone. `is_due` is
    asked between frames only: whether the next one must be on its way; it raises when nobody wants that any more.
    Of a frame that is due or has begun, no bytes for `stall_s` are a loss: a frame is sent at once."""

    stall_s = LONGEST_WAIT_S

    def __init__(self, sock: socket.socket, rank: int = 0, check_alive: Callable[[], None] = lambda: None,
                 is_due: Callable[[], bool] = lambda: False) -> None:
        self.rank, self.check_alive, self.is_due = rank, check_alive, is_due
        self._socket = sock
        tune(sock)
        sock.setblocking(False)
        self._out = bytearray(HEADER_BYTES + _JOINED_BYTES)
        self._head = memoryview(bytearray(HEADER_BYTES))
        self._ahead = memoryview(bytearray(HEADER_BYTES + _JOINED_BYTES))
        self._held = self._ahead[:0]  # what was read of a frame whose length was foreseen, and not yet asked for
        self._next: Header | None = None
        self.sent_bytes = self.received_bytes = 0
        self.waited_s = 0.0
        self._n_long_waits = 0  # in a row

    def send(self, kind: Kind, moment: Moment, payload: memoryview | bytes = b"",
             within_s: float = LONGEST_WAIT_S) -> None:
        """Send one frame. Raises PeerLost."""
        n_bytes = len(payload)
        deadline_s = time.monotonic() + within_s
        header = pack(kind, moment, n_bytes)
        if n_bytes <= _JOINED_BYTES:
            self._out[:HEADER_BYTES] = header
            self._out[HEADER_BYTES:HEADER_BYTES + n_bytes] = payload
            self._write(memoryview(self._out)[:HEADER_BYTES + n_bytes], deadline_s)
        else:
            self._write(memoryview(header), deadline_s)
            self._write(memoryview(payload), deadline_s)
        self.sent_bytes += HEADER_BYTES + n_bytes

    def _write(self, data: memoryview, deadline_s: float) -> None:
        while data:
            try:
                data = data[self._socket.send(data):]
            except _NOT_YET:
                if not self._ready(select.POLLOUT):
                    self._look(deadline_s)
            except OSError as error:
                raise self._broken(error) from error

    def peek(self, max_bytes: int = MAX_MESSAGE_BYTES, within_s: float = LONGEST_WAIT_S, foreseen: int = 0) -> Header:
        """The header of the next frame, which stays next. So many `foreseen` bytes of payload are read with it where
        they have come: a small frame is then one call to the system. Raises PeerLost, BadFrame."""
        if self._next is None:
            self._read(self._head, time.monotonic() + within_s, min(foreseen, _JOINED_BYTES))
            self._next = unpack(self._head, max_bytes)
        elif self._next.n_bytes > max_bytes:
            raise BadFrame(f"{self._next.n_bytes} bytes announced, {max_bytes} are allowed")
        return self._next

    def has_begun(self) -> bool:
        """Whether something of the next frame is here, so that `peek` will not wait for long."""
        if self._next is not None or self._held:
            return True
        return self._ready(select.POLLIN, 0)

    def take(self, into: memoryview, within_s: float = LONGEST_WAIT_S) -> None:
        """The next frame's payload, which must be as long as `into`."""
        header = self.peek(len(into), within_s)
        if header.n_bytes != len(into):
            raise BadFrame(f"{header.n_bytes} bytes came, {len(into)} were expected")
        self._read(into, time.monotonic() + within_s)
        self._next = None
        self.received_bytes += HEADER_BYTES + len(into)

    def take_part(self, into: memoryview, within_s: float = LONGEST_WAIT_S) -> None:
        """The first bytes of the next frame's payload; `take` takes the others."""
        assert self._next is not None  # it was peeked at
        if self._next.n_bytes < len(into):
            raise BadFrame(f"{self._next.n_bytes} bytes came, {len(into)} or more were expected")
        self._read(into, time.monotonic() + within_s)
        self._next = self._next._replace(n_bytes=self._next.n_bytes - len(into))

    def skip(self, max_bytes: int, within_s: float = LONGEST_WAIT_S) -> None:
        """Drop the next frame."""
        left = self.peek(max_bytes, within_s).n_bytes
        rest = memoryview(bytearray(min(left, _JOINED_BYTES)))
        deadline_s = time.monotonic() + within_s
        while left:
            part = rest[:min(left, len(rest))]
            self._read(part, deadline_s)
            left -= len(part)
        self._next = None

    def _read(self, into: memoryview, deadline_s: float, foreseen: int = 0) -> None:
        """Fill `into`, and keep up to `foreseen` bytes that come with it for the next read."""
        if self._held:
            n = min(len(into), len(self._held))
            into[:n], self._held = self._held[:n], self._held[n:]
            into = into[n:]
        while into:
            is_between = into is self._head  # not a byte of the frame has come
            if not foreseen:
                into = into[self._receive(into, deadline_s, is_between=is_between):]
                continue
            n = self._receive(self._ahead[:len(into) + foreseen], deadline_s, is_between=is_between)
            self._held = self._ahead[:n]
            n = min(n, len(into))
            into[:n], self._held = self._held[:n], self._held[n:]
            into, foreseen = into[n:], 0

    def _receive(self, into: memoryview, deadline_s: float, *, is_between: bool) -> int:
        """Wait for some bytes, and how many came. `is_between`: none of the frame's have come yet."""
        try:  # most often it is here already
            n = self._socket.recv_into(into)
        except _NOT_YET:
            n = self._wait_for(into, deadline_s, is_between=is_between)
        except OSError as error:
            raise self._broken(error) from error
        if n == 0:
            raise PeerLost(self.rank, "it closed the connection")
        return n

    def _wait_for(self, into: memoryview, deadline_s: float, *, is_between: bool) -> int:
        began_s = time.monotonic()
        spin_until_s = began_s + SPIN_S * (self._n_long_waits < _MAX_SPUN_IN_VAIN)
        is_due = not is_between
        if is_due:
            deadline_s = min(deadline_s, began_s + self.stall_s)
        try:
            while True:
                if time.monotonic() < spin_until_s:
                    _let_others()
                elif not self._ready(select.POLLIN):
                    self._look(deadline_s)
                    if not is_due and self.is_due():
                        is_due, deadline_s = True, min(deadline_s, time.monotonic() + self.stall_s)
                try:
                    return self._socket.recv_into(into)
                except _NOT_YET:
                    continue
                except OSError as error:
                    raise self._broken(error) from error
        finally:
            waited_s = time.monotonic() - began_s
            self.waited_s += waited_s
            self._n_long_waits = self._n_long_waits + 1 if waited_s > SPIN_S else 0

    def _ready(self, event: int, within_ms: int = _LOOK_EVERY_MS) -> bool:
        """Sleep until the socket can be read or written, or it is time to look."""
        poll = select.poll()
        poll.register(self._socket, event)
        return bool(poll.poll(within_ms))

    def _broken(self, error: OSError) -> PeerLost:
        return PeerLost(self.rank, f"the connection broke: {error.strerror or error}")

    def _look(self, deadline_s: float) -> None:
        self.check_alive()
        if time.monotonic() > deadline_s:
            raise PeerLost(self.rank, "it did not answer in time")

    def send_message(self, kind: Kind, message: dict[str, Any], within_s: float = LONGEST_WAIT_S) -> None:
        """A control message: JSON, bounded."""
        raw = json.dumps(message).encode()
        assert len(raw) <= MAX_MESSAGE_BYTES
        self.send(kind, Moment(0), raw, within_s)

    def receive_message(self, *kinds: Kind, within_s: float = LONGEST_WAIT_S) -> tuple[Header, dict[str, Any]]:
        """The next frame, one of `kinds`, with its JSON object. Raises BadFrame, PeerLost."""
        header = self.peek(within_s=within_s)
        if header.kind not in kinds:
            raise BadFrame(f"{header.kind.name} came, {' or '.join(kind.name for kind in kinds)} was expected")
        raw = bytearray(header.n_bytes)
        self.take(memoryview(raw), within_s)
        return header, parse_message(bytes(raw))

    def close(self) -> None:
        self._socket.close()


def parse_message(raw: bytes) -> dict[str, Any]:
    """A JSON object of bounded depth. Raises BadFrame."""
    if raw.count(b"[") + raw.count(b"{") > MAX_MESSAGE_BYTES // 64 or _depth(raw) > _MAX_DEPTH:
        raise BadFrame("a message that is nested too deep")
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadFrame("a message that is no JSON") from None
    if not isinstance(message, dict):
        raise BadFrame("a message that is no object")
    return message


def _depth(raw: bytes) -> int:
    """Open brackets at most, those inside texts included: a bound, not a parser."""
    depth = deepest = 0
    for byte in raw:
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def tune(sock: socket.socket) -> None:
    """No waiting for fuller packets, and room for a piece of every exchange in each direction."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
