"""Who belongs to the cluster: the paired devices, with the certificates that are pinned and where they were last seen.

A file of the user's own (mode 0600). Addresses in it are hints; the certificate is the identity.
"""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgert.errors import ClusterError
from edgert.paths import Paths
from tensorpar.identity import MAX_NAME_LENGTH, Identity, check_certificate, check_name, fingerprint, write_private

DEFAULT_PORT = 7440
MAX_MEMBERS = 63  # and the leader
_MAX_FILE_BYTES = 2**20
Role = Literal["leader", "worker"]


@dataclass(frozen=True, slots=True)
class Member:
    """A paired device. `host` and `port` say where it was last."""

    name: str
    certificate: str
    host: str = ""
    port: int = DEFAULT_PORT

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.certificate)


@dataclass(frozen=True, slots=True)
class Membership:
    """This device's part in a cluster."""

    directory: Path
    name: str
    role: Role
    members: tuple[Member, ...] = ()

    @classmethod
    def create(cls, paths: Paths, role: Role, name: str | None = None) -> Membership:
        """The membership of this device, made at the first call. Raises ClusterError when it has the other role."""
        found = cls.load(paths)
        if found is None:
            found = cls(paths.config / "cluster", (name or socket.gethostname())[:MAX_NAME_LENGTH] or "device", role)
            found.save()
        if found.role != role:
            raise ClusterError(f"this device is a {found.role} already",
                               f"Remove {found.directory} to begin anew as a {role}.")
        return found

    @classmethod
    def load(cls, paths: Paths) -> Membership | None:
        """What was saved, or None. Raises ClusterError for a damaged file."""
        directory = paths.config / "cluster"
        path = directory / "members.json"
        try:
            with path.open("rb") as file:
                raw = json.loads(file.read(_MAX_FILE_BYTES))
            members = tuple(_member(one) for one in raw["members"])
            role = raw["role"]
            if role not in ("leader", "worker") or len(members) > MAX_MEMBERS:
                raise ValueError(f"role {role!r}")
            return cls(directory, check_name(raw["name"]), role, members)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ClusterError(f"{path} is damaged: {error}",
                               f"Remove {directory} and pair the devices again.") from error

    @classmethod
    def leading(cls, paths: Paths) -> Membership:
        """This device's membership, where it leads. Raises ClusterError."""
        found = cls.load(paths)
        if found is None or found.role != "leader":
            raise ClusterError("this device leads no cluster", "Begin with `edgert cluster init`.")
        return found

    @property
    def identity(self) -> Identity:
        return Identity.load_or_create(self.directory, self.name)

    def save(self) -> None:
        members = [asdict(one) for one in self.members]
        raw = {"version": 1, "name": self.name, "role": self.role, "members": members}
        try:
            write_private(self.directory / "members.json", json.dumps(raw, indent=1).encode())
        except OSError as error:
            raise ClusterError(f"{self.directory}: {error.strerror}",
                               "Make the directory writable, or set EDGERT_HOME.") from error

    def with_member(self, new: Member) -> Membership:
        """The same with a device more, saved. A device of this certificate is replaced; names stay unique."""
        others = [one for one in self.members if one.certificate != new.certificate]
        if len(others) >= MAX_MEMBERS:
            raise ClusterError(f"the cluster has {MAX_MEMBERS} devices already", "Forget one: `edgert cluster forget`.")
        names = {one.name for one in others}
        name = next(one for one in (new.name, *(f"{new.name}-{n}" for n in range(2, 99))) if one not in names)
        changed = replace(self, members=(*others, replace(new, name=name)))
        changed.save()
        return changed

    def without(self, name: str) -> Membership:
        """The same without the device of this name, saved. Raises ClusterError."""
        if name not in (names := [one.name for one in self.members]):
            raise ClusterError(f"no device is called {name!r}", f"There are: {', '.join(names) or 'none'}.")
        changed = replace(self, members=tuple(one for one in self.members if one.name != name))
        changed.save()
        return changed


def _member(raw: Any) -> Member:
    host, port = raw["host"], raw["port"]
    if not isinstance(host, str) or not isinstance(port, int) or not 0 <= port < 2**16:
        raise ValueError("an address")
    return Member(check_name(raw["name"]), check_certificate(raw["certificate"]), host, port)


def parse_address(text: str) -> tuple[str, int]:
    """`host`, `host:port`, `[v6]:port` or a bare IPv6 address. Raises ClusterError."""
    host, separator, port = text.rpartition(":")
    if not separator or (":" in host and not host.endswith("]")):
        host, port = text, str(DEFAULT_PORT)
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16 or not host:
        raise ClusterError(f"{text!r} is no address", "Write HOST:PORT, such as 192.168.1.20:7440.")
    return host.strip("[]"), int(port)
