"""The workers that a leader has: how they are found, dialled and connected. Knows nothing of what they compute."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from edgert.errors import ClusterError
from tensorpar import discovery
from tensorpar.collectives import Algorithm
from tensorpar.members import Member, Membership
from tensorpar.peer import Peer
from tensorpar.wire import WireName

Devices = Literal["auto", "all"] | int
_DISCOVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """How many devices: `auto` takes what is predicted to be fastest, `all` everybody who is there. `peers` are
    addresses to try beside those that are known."""

    devices: Devices = "auto"
    peers: tuple[tuple[str, int], ...] = ()
    wire: WireName = "f32"
    algorithm: Algorithm | None = None
    discovery_s: float = _DISCOVERY_S


class Workers:
    """The connected workers, and how those that are away are reached again."""

    def __init__(self, membership: Membership, options: ClusterOptions, is_due: Callable[[], bool]) -> None:
        self._membership, self._options, self._is_due = membership, options, is_due
        self.connected: list[Peer] = []

    def connect(self) -> list[str]:
        """Dial every member that is not connected, all at once, where it was last and then where mDNS sees it; why
        others are missing, a sentence each."""
        names = {one.member.name for one in self.connected}
        missing = [one for one in self._membership.members if one.name not in names]
        known = {one.name: [*self._options.peers, *([(one.host, one.port)] if one.host else [])] for one in missing}
        problems = self._dial_all(missing, known)
        missing = [one for one in missing if one.name in problems]
        if missing and self._options.discovery_s:
            wanted = frozenset(one.fingerprint for one in missing)
            sightings = discovery.browse("work", self._options.discovery_s, wanted)
            seen = {one.name: [(host, sighting.port) for sighting in sightings for host in sighting.hosts
                               if one.fingerprint.startswith(sighting.fingerprint)] for one in missing}
            again = [one for one in missing if seen[one.name]]
            problems = {**{one.name: problems[one.name] for one in missing if one not in again},
                        **self._dial_all(again, seen)}
        return list(problems.values())

    def _dial_all(self, members: Sequence[Member], addresses: Mapping[str, list[tuple[str, int]]]) -> dict[str, str]:
        """Connect those who answer; by name, why others do not."""
        problems: dict[str, str] = {}
        if members:
            with ThreadPoolExecutor(len(members), "dial") as pool:
                for member, found in zip(members, pool.map(lambda one: self._dial(one, addresses[one.name]), members),
                                         strict=True):
                    if isinstance(found, Peer):
                        self.connected.append(found)
                    else:
                        problems[member.name] = found
        return problems

    def _dial(self, member: Member, addresses: Sequence[tuple[str, int]]) -> Peer | str:
        try:
            return Peer.connect(member, self._membership.identity, secrets.token_hex(8), dict.fromkeys(addresses),
                                self._is_due)
        except ClusterError as error:
            return f"{member.name} is left out: {error.message}"

    def drop(self, peer: Peer) -> None:
        self.connected.remove(peer)
        peer.close()

    def close(self) -> None:
        for peer in self.connected:
            peer.close()
        self.connected = []
