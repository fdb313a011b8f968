"""`edgert cluster init`, `invite`, `join` and `forget`: who belongs together."""

from __future__ import annotations

import json
import socket

from edgert.errors import ClusterError
from edgert.paths import Paths
from tensorpar import discovery, pairing
from tensorpar.members import DEFAULT_PORT, Membership, Role, parse_address
from tensorpar.words import new_code, parse_code

_DIAL_S, _SEARCH_S = 5.0, 3.0


def init(name: str | None) -> int:
    membership = Membership.create(Paths.of_user(), "leader", name)
    _ = membership.identity
    print(f"{membership.name} leads. Now `edgert cluster invite`, and `edgert cluster join CODE` on another device.")
    return 0


def invite(port: int, *, as_json: bool) -> int:
    """Show a code and wait until a device has come with it."""
    membership = Membership.leading(Paths.of_user())
    identity, code = membership.identity, new_code()
    with listening(port) as server:
        if as_json:
            print(json.dumps({"code": code, "port": port, "valid_s": pairing.VALID_S}), flush=True)
        else:
            print(f"On the other device, within two minutes:\n\n    edgert cluster join {code}\n", flush=True)
        with discovery.announced("invite", identity.fingerprint, port):
            member = pairing.invite(server, identity, membership.name, code)
    joined = membership.with_member(member)
    name = joined.members[-1].name
    print(json.dumps({"joined": name}) if as_json else f"{name} has joined. There: `edgert cluster up`.")
    return 0


def join(code: str, peer: str | None, name: str | None, port: int) -> int:
    code = parse_code(code)
    membership = Membership.create(Paths.of_user(), "worker", name)
    addresses = [parse_address(peer)] if peer else [
        (host, one.port) for one in discovery.browse("invite", _SEARCH_S) for host in one.hosts]
    if not addresses:
        raise ClusterError("no device that invites was found",
                           f"Name its address: --peer HOST:{DEFAULT_PORT}. Does multicast pass your network?")
    leader = pairing.join(_dial(addresses), membership.identity, membership.name, port, code)
    membership.with_member(leader)
    print(f"Joined {leader.name}. Now `edgert cluster up`.")
    return 0


def _dial(addresses: list[tuple[str, int]]) -> socket.socket:
    for address in addresses:
        try:
            return socket.create_connection(address, _DIAL_S)
        except OSError as error:
            problem = ClusterError(f"{address[0]}:{address[1]} does not answer: {error.strerror or error}",
                                   "Is `edgert cluster invite` waiting there, and the port open?")
    raise problem


def forget(name: str) -> int:
    required().without(name)
    print(f"{name} is forgotten. To keep it out for good, nothing else is needed.")
    return 0


def required(role: Role | None = None) -> Membership:
    """This device's membership. Raises ClusterError where it has none, or another role."""
    membership = Membership.load(Paths.of_user())
    if membership is None or (role is not None and membership.role != role):
        raise ClusterError("this device is in no cluster",
                           "Begin with `edgert cluster init`, or `edgert cluster join CODE`.")
    return membership


def listening(port: int) -> socket.socket:
    """A listening socket. Raises ClusterError."""
    try:
        return discovery.listen(port)
    except OSError as error:
        raise ClusterError(f"port {port} cannot be used: {error.strerror or error}",
                           "Is another `edgert cluster` running? Choose another --port.") from error
