"""A worker's links to the other workers of an epoch: each dials those of lower rank, and is dialled by the others.

The leader introduces them to each other, with their certificates, which count for this and nothing else, and only as
long as the epoch lasts. Where one cannot reach another (a firewall, two networks), there is no mesh, and all sums go
through the leader.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable

from edgert.errors import ClusterError, PeerLost
from tensorpar.frames import Kind
from tensorpar.identity import Identity, is_one_of
from tensorpar.link import Link
from tensorpar.messages import Introduction, whole
from tensorpar.probe import Speed, echo, measure

_DIAL_S = 3.0
# All are ready when they dial: more than handshakes and measurements need, on a slow card.
_MEETING_S = 5.0
# Between workers there are no heartbeats, but the systems' own: what is sent, or a probe on a link over which one waits
# for a second, is acknowledged by the other's system, however busy or stopped the other is. After so long it is not.
_UNHEARD_MS, _PROBE_S = 2500, 1
_PROBES = {"TCP_USER_TIMEOUT": _UNHEARD_MS, "TCP_KEEPIDLE": _PROBE_S, "TCP_KEEPALIVE": _PROBE_S,  # macOS' name for it
           "TCP_KEEPINTVL": _PROBE_S, "TCP_KEEPCNT": 2}


class Mesh:
    """The links of one rank, which `meet` opens. `admit` comes from the threads of those that dial."""

    def __init__(self, introduction: Introduction, rank: int, identity: Identity) -> None:
        self._introduction, self._rank, self._identity = introduction, rank, identity
        self.links: dict[int, Link] = {}
        self._awaited = {one.rank: one.certificate for one in introduction.others if one.rank > rank}
        self._changed = threading.Condition()
        self._closed = False

    @property
    def certificates(self) -> list[str]:
        """Of those that will dial."""
        return list(self._awaited.values())

    def admit(self, tls: ssl.SSLSocket, link: Link, hello: dict[str, object]) -> None:
        """One that dialled: it measures the link, then the link is this rank's. Raises ClusterError for whoever is not
        the one that he says."""
        rank = whole(hello, "rank", self._rank + 1, 64)
        certificate, meeting = self._awaited.get(rank), hello.get("meeting")
        if (certificate is None or meeting != self._introduction.meeting
                or not is_one_of(tls, [certificate])):
            raise ClusterError("somebody came who was not introduced")
        link.rank = rank
        _notice_silence(tls)
        while link.peek(2**20, _MEETING_S).kind is Kind.PROBE:
            echo(link)
        link.receive_message(Kind.READY, within_s=_MEETING_S)
        with self._changed:
            if self._closed or rank in self.links:
                raise ClusterError("somebody came too late, or twice")
            self.links[rank] = link
            self._changed.notify()

    def meet(self, check_alive: Callable[[], None], is_due: Callable[[], bool]) -> Speed:
        """Open all links, which ask these two; the slowest one's speed. Raises ClusterError when one does not come
        about."""
        speeds = [self._dial(one.rank, one.host, one.port, one.certificate) for one in self._introduction.others
                  if one.rank < self._rank]
        with self._changed:
            if not self._changed.wait_for(lambda: self._awaited.keys() <= self.links.keys(), _MEETING_S):
                raise ClusterError("another worker did not come")
        for link in self.links.values():
            link.check_alive, link.is_due, link.stall_s = check_alive, is_due, _UNHEARD_MS / 1000
        return Speed(max((one.latency_s for one in speeds), default=1e-6),
                     min((one.bytes_per_s for one in speeds), default=1e12))

    def _dial(self, rank: int, host: str, port: int, certificate: str) -> Speed:
        tls = self._identity.dial(host, port, certificate, _DIAL_S)
        _notice_silence(tls)
        link = Link(tls, rank)
        try:
            link.send_message(Kind.HELLO, {"purpose": "rank", "rank": self._rank,
                                           "meeting": self._introduction.meeting}, within_s=_MEETING_S)
            speed = measure(link)
            link.send_message(Kind.READY, {}, within_s=_MEETING_S)
        except (ClusterError, PeerLost):
            link.close()
            raise
        with self._changed:
            self.links[rank] = link
        return speed

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for link in self.links.values():
                link.close()
            self.links = {}


def _notice_silence(sock: socket.socket) -> None:
    """Let a connection break over which nothing arrives any more, though nobody has closed it (RFC 1122, section
    4.2.3.6; RFC 5482)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):  # not every system has all
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
