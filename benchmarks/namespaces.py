"""Hosts that are network namespaces of this machine, on a switch that is a bridge in a namespace of its own.

So addresses, multicast and cut cables are real and nothing of the machine's own network is touched. Needs root.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Family = Literal["IPv4", "IPv6"]
_numbers = itertools.count()


def problem() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is missing"
    name = f"edgert-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode:
        return f"the kernel makes no network namespace: {made.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return ""


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace, its address, and the port of the switch that its cable is in."""

    namespace: str
    address: str
    switch: str
    port: str

    @property
    def prefix(self) -> list[str]:
        """Put before a command, it runs on this host."""
        return ["ip", "netns", "exec", self.namespace]

    def keep_multicast_back(self) -> None:
        """The switch passes no more multicast to this host, as some access points do."""
        subprocess.run(["ip", "netns", "exec", self.switch, "bridge", "link", "set", "dev", self.port, "mcast_flood",
                        "off"], check=True, capture_output=True)

    def cut(self) -> None:
        """Pull the cable."""
        _ip("-n", self.switch, "link", "set", self.port, "down")

    def mend(self) -> None:
        _ip("-n", self.switch, "link", "set", self.port, "up")

    def lose(self, other: Host) -> None:
        """Nothing that this host sends to the other arrives any more, and nobody is told."""
        _ip("-n", self.namespace, "route", "add", "blackhole", other.address)

    def limit(self, mbit_s: float) -> None:
        """A cable of so many Mbit/s in each direction (`tc tbf`)."""
        for namespace, device in ((self.namespace, "eth0"), (self.switch, self.port)):
            subprocess.run(["ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", device, "root", "tbf",
                            "rate", f"{mbit_s}mbit", "burst", "64kb", "latency", "100ms"], check=True,
                           capture_output=True)


@contextmanager
def hosts(n: int, family: Family = "IPv4") -> Iterator[list[Host]]:
    """`n` hosts on one switch, with addresses of one family (IPv6 hosts have link-local ones too)."""
    base = f"edgert-{os.getpid()}-{next(_numbers)}"
    switch = f"{base}-switch"
    made: list[str] = []
    try:
        _ip("netns", "add", switch)
        made.append(switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        found = []
        for number in range(1, n + 1):
            name, port = f"{base}-{number}", f"port{number}"
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
            address = f"10.77.0.{number}" if family == "IPv4" else f"fd77::{number}"
            _ip("-n", name, "addr", "add", f"{address}/{'24' if family == 'IPv4' else '64'}", "dev", "eth0",
                *(["nodad"] if family == "IPv6" else []))
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            found.append(Host(name, address, switch, port))
        yield found
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
