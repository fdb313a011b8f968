"""Pairing: two devices that know the same short code exchange certificates that nobody between them can replace.

SPAKE2 turns the code into a strong key without giving a listener anything to guess with; each side then proves that
it has the key over all that was said, both certificates included. Three tries and two minutes.
Source: RFC 9382 (SPAKE2), with the key confirmation of its section 4 over the whole transcript.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import socket
import time
from collections.abc import Callable

from spake2 import SPAKE2_A, SPAKE2_B, SPAKEError

from edgert.errors import ClusterError, PeerLost
from tensorpar.frames import BadFrame, Kind, Moment
from tensorpar.identity import Identity, check_certificate, check_name
from tensorpar.link import Link, parse_message
from tensorpar.members import Member

MAX_TRIES = 3
VALID_S = 120.0
# A client that connects and says nothing holds the only place at the door: not for long.
_EXCHANGE_S = 5.0
_MAX_BYTES = 2**13
_log = logging.getLogger(__name__)


class WrongCode(ClusterError):
    """The other side does not know the code."""

    def __init__(self) -> None:
        super().__init__("the code is wrong, or somebody is in between",
                         "Ask for a new one: `edgert cluster invite` on the leading device.")


def invite(server: socket.socket, identity: Identity, name: str, code: str, *,
           clock: Callable[[], float] = time.monotonic) -> Member:
    """Wait at a listening socket for the device that knows the code. Raises ClusterError when tries or time are up."""
    deadline_s, n_tries = clock() + VALID_S, 0
    while n_tries < MAX_TRIES:
        left_s = deadline_s - clock()
        if left_s <= 0:
            raise ClusterError("nobody came with the code within two minutes", "Invite again.")
        server.settimeout(min(left_s, 1.0))
        try:
            connection, address = server.accept()
        except TimeoutError:
            continue
        link = Link(connection)
        exchange = _Exchange(link, identity, name, 0)
        try:
            return exchange.invite(code, str(address[0]))
        except (ClusterError, ValueError) as error:
            n_tries += exchange.has_answered  # only then could a guess be tried
            _log.warning("pairing with %s failed: %s", address[0], str(error).splitlines()[0])
        finally:
            link.close()
    raise ClusterError("three wrong codes came", "If it was not you who typed them, look who is on your network.")


def join(connection: socket.socket, identity: Identity, name: str, port: int, code: str) -> Member:
    """Pair with the device that waits at the other end of a connection. `port` is where this device will listen.
    Raises WrongCode, ClusterError."""
    host = connection.getpeername()[0] if connection.family != socket.AF_UNIX else ""
    link = Link(connection)
    try:
        return _Exchange(link, identity, name, port).join(code, host)
    except ValueError as error:
        raise ClusterError(f"the other device sends nonsense: {error}", "Use the same version of edgert.") from error
    finally:
        link.close()


class _Exchange:
    """One conversation: SPAKE both ways, then CONFIRM both ways, the joining side first each time."""

    def __init__(self, link: Link, identity: Identity, name: str, port: int) -> None:
        self._link, self._identity, self._name, self._port = link, identity, name, port
        self._transcript = hashlib.sha256(b"edgert-pairing-1")
        self.has_answered = False
        self._deadline_s = time.monotonic() + _EXCHANGE_S

    def invite(self, code: str, host: str) -> Member:
        spake = SPAKE2_A(code.encode())
        theirs, member = self._hear(host)
        self.has_answered = True
        self._say(spake.start())
        key = self._key(spake, theirs)
        self._check(key, b"join")
        self._link.send(Kind.CONFIRM, Moment(0), self._proof(key, b"invite"))
        return member

    def join(self, code: str, host: str) -> Member:
        spake = SPAKE2_B(code.encode())
        self._say(spake.start())
        theirs, member = self._hear(host)
        key = self._key(spake, theirs)
        self._link.send(Kind.CONFIRM, Moment(0), self._proof(key, b"join"))
        try:
            self._check(key, b"invite")
        except PeerLost:
            raise WrongCode from None  # it hangs up on a wrong proof
        return member

    def _say(self, element: bytes) -> None:
        message = {"spake": element.hex(), "certificate": self._identity.certificate, "name": self._name,
                   "port": self._port}
        self._link.send_message(Kind.SPAKE, message, within_s=_EXCHANGE_S)
        self._transcript.update(repr(sorted(message.items())).encode())

    def _hear(self, host: str) -> tuple[bytes, Member]:
        raw = self._receive(Kind.SPAKE, _MAX_BYTES)
        message = parse_message(raw)
        port = message.get("port")
        if not isinstance(port, int) or not 0 <= port < 2**16:
            raise ValueError("no port")
        member = Member(check_name(message.get("name")), check_certificate(message.get("certificate")), host, port)
        element = bytes.fromhex(str(message.get("spake")))
        said = {"spake": element.hex(), "certificate": member.certificate, "name": member.name, "port": port}
        self._transcript.update(repr(sorted(said.items())).encode())
        return element, member

    def _receive(self, kind: Kind, max_bytes: int) -> bytes:
        left_s = max(0.0, self._deadline_s - time.monotonic())
        header = self._link.peek(max_bytes, left_s)
        if header.kind is not kind:
            raise BadFrame(f"{header.kind.name} came, {kind.name} was expected")
        raw = bytearray(header.n_bytes)
        self._link.take(memoryview(raw), left_s)
        return bytes(raw)

    @staticmethod
    def _key(spake: SPAKE2_A | SPAKE2_B, theirs: bytes) -> bytes:
        try:
            return bytes(spake.finish(theirs))
        except (SPAKEError, ValueError, AssertionError) as error:
            raise BadFrame("no SPAKE2 element") from error

    def _proof(self, key: bytes, side: bytes) -> bytes:
        return hmac.digest(key, side + self._transcript.digest(), "sha256")

    def _check(self, key: bytes, side: bytes) -> None:
        if not hmac.compare_digest(self._receive(Kind.CONFIRM, 32), self._proof(key, side)):
            raise WrongCode
