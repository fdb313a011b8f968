"""`edgert cluster doctor`: why a device is not reached, one check after the other, each with what helps."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import edgert
from apps.cli.terminal import without_controls
from apps.cluster.pair import required
from edgert.errors import ClusterError
from tensorpar import discovery
from tensorpar.members import Member, Membership, parse_address
from tensorpar.peer import ask_status

_SEARCH_S, _DIAL_S = 3.0, 3.0
_OWN = "0" * 16  # the fingerprint of an announcement that is only made to be heard
# Certificates are valid from a day before they were made: a clock that is off by more refuses them.
_MAX_CLOCK_S = 3600.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: whether it is well, what was seen, and what to do where it is not."""

    what: str
    is_well: bool
    seen: str
    remedy: str = ""


def doctor(peers: Sequence[str]) -> int:
    """Print every finding; the exit status is that of a ClusterError when something is wrong."""
    found = list(examine(required(), [parse_address(one) for one in peers]))
    for one in found:
        print(without_controls(f"{'ok  ' if one.is_well else 'FAIL'}  {one.what}: {one.seen}"))
        if not one.is_well:
            print(f"      {one.remedy}")
    return 0 if all(one.is_well for one in found) else ClusterError.exit_code


def examine(membership: Membership, addresses: Sequence[tuple[str, int]]) -> Iterator[Finding]:
    """Interfaces, multicast, then each device: address, port, certificate, version and clock."""
    own = [one for one in discovery.own_addresses() if not one.startswith(("127.", "fe80"))]
    yield Finding("interfaces", bool(own), ", ".join(own) or "only loopback", "Connect this device to a network.")
    wanted = frozenset([_OWN, *(one.fingerprint for one in membership.members)])
    with discovery.announced("work", _OWN, 9):
        heard = discovery.browse("work", _SEARCH_S, wanted)
    yield Finding("multicast here", any(one.fingerprint == _OWN for one in heard),
                  f"{len(heard)} announcements heard, this device's own included" if heard else "nothing heard",
                  "A firewall on this device blocks mDNS: allow UDP port 5353, or name addresses with --peer.")
    if membership.role == "worker":
        yield Finding("role", True, "this device works; its leader dials it: run the doctor there too")
        return
    yield Finding("paired devices", bool(membership.members), str(len(membership.members)),
                  "Pair one: `edgert cluster invite` here, `edgert cluster join CODE` there.")
    for member in membership.members:
        seen = [(host, one.port) for one in heard if member.fingerprint.startswith(one.fingerprint)
                for host in one.hosts]
        known = [(member.host, member.port)] if member.host else []
        yield Finding(f"{member.name}: mDNS", bool(seen), ", ".join(host for host, _ in seen) or "not heard",
                      "If it runs without --no-mdns, the network keeps multicast (UDP 5353) back: allow it between "
                      "these devices, or name its address with --peer.")
        yield from _examine_device(membership, member, list(dict.fromkeys([*addresses, *seen, *known])))


def _examine_device(membership: Membership, member: Member, addresses: list[tuple[str, int]]) -> Iterator[Finding]:
    problem = "no address is known"
    for host, port in addresses:
        try:
            socket.create_connection((host, port), _DIAL_S).close()
        except OSError as error:
            problem = f"{host}:{port} {error.strerror or error}"
            continue
        yield Finding(f"{member.name}: port", True, f"{host}:{port} answers")
        yield from _examine_answer(membership, member, host, port)
        return
    yield Finding(f"{member.name}: port", False, problem,
                  "Start `edgert cluster up` there, open its port in the firewall, or name its address with --peer.")


def _examine_answer(membership: Membership, member: Member, host: str, port: int) -> Iterator[Finding]:
    began_s = time.time()
    try:
        status = ask_status(member, membership.identity, host, port)
    except (ClusterError, OSError) as error:
        seen = str(error).splitlines()[0]
        yield Finding(f"{member.name}: certificate", False, seen,
                      "One of the two has forgotten the other: `edgert cluster invite` here, `join` there.")
        return
    yield Finding(f"{member.name}: certificate", True, "the one that was paired")
    version = str(status.get("version"))[:20]
    yield Finding(f"{member.name}: version", version == edgert.__version__, version,
                  f"Install edgert {edgert.__version__} there: versions must be the same.")
    their_time_s = status.get("time_s")
    off_s = abs(float(their_time_s) - began_s) if isinstance(their_time_s, (int, float)) else 0.0
    yield Finding(f"{member.name}: clock", off_s < _MAX_CLOCK_S, f"{off_s:.0f} s off",
                  "Set the clocks (timedatectl set-ntp true): certificates have dates.")
