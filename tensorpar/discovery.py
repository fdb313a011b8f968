"""Finding devices over mDNS (`_edgert._tcp`, RFC 6762 and 6763): a hint where somebody may be, never who it is.

Where multicast does not pass, nothing is found and addresses must be named.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import ifaddr
from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

SERVICE = "_edgert._tcp.local."
Purpose = Literal["invite", "work"]
# Whoever announces more is not looked at: every answer costs a thread's time and some memory.
_MAX_FOUND = 64
_INFO_MS = 1000
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sighting:
    """Somebody who says that he is there. `fingerprint` begins the one of his certificate, or pretends to."""

    purpose: str
    fingerprint: str
    hosts: tuple[str, ...]
    port: int


def _open() -> Zeroconf | None:
    """mDNS on every interface but loopback; None where there is none, or no multicast."""
    interfaces: list[str | tuple[tuple[str, int, int], int] | int] = []
    for adapter in ifaddr.get_adapters():
        v4 = [ip.ip for ip in adapter.ips if isinstance(ip.ip, str) and not ip.ip.startswith("127.")]
        has_v6 = any(not isinstance(ip.ip, str) and ip.ip[0] != "::1" for ip in adapter.ips)
        interfaces += [*v4, *([adapter.index] if has_v6 and adapter.index is not None else [])]
    if not interfaces:
        return None
    try:
        return Zeroconf(interfaces, ip_version=IPVersion.All)
    except (OSError, ZeroconfError) as error:
        _log.info("mDNS is not available: %s", error)
        return None


@contextmanager
def announced(purpose: Purpose, fingerprint: str, port: int) -> Iterator[None]:
    """Say that this device is here, until the block ends. Where that is not possible, it is logged and left."""
    zeroconf = _open()
    if zeroconf is None:
        _log.warning("mDNS is not available: others must name this device's address")
        yield
        return
    info = ServiceInfo(SERVICE, f"{purpose}-{fingerprint[:16]}.{SERVICE}", port=port, parsed_addresses=own_addresses(),
                       server=f"edgert-{fingerprint[:16]}.local.",
                       properties={"v": "1", "for": purpose, "fp": fingerprint[:16]})
    try:
        with suppress(OSError, ZeroconfError):
            zeroconf.register_service(info, allow_name_change=True)
        yield
    finally:
        with suppress(OSError, ZeroconfError):
            zeroconf.unregister_service(info)
        zeroconf.close()


def browse(purpose: Purpose, within_s: float, fingerprints: frozenset[str] | None = None) -> list[Sighting]:
    """Who announces himself for this purpose; as soon as all of `fingerprints` (or, without them, one) are seen."""
    zeroconf = _open()
    if zeroconf is None:
        return []
    listener = _Listener(purpose)
    try:
        browser = ServiceBrowser(zeroconf, SERVICE, listener)
        deadline_s = time.monotonic() + within_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            listener.changed.wait(min(left_s, 0.1))
            seen = {one.fingerprint for one in listener.found.values()}
            if seen and (fingerprints is None or {one[:16] for one in fingerprints} <= seen):
                break
        browser.cancel()
    finally:
        zeroconf.close()
    return list(listener.found.values())


class _Listener(ServiceListener):
    def __init__(self, purpose: Purpose) -> None:
        self._purpose = purpose
        self.found: dict[str, Sighting] = {}
        self.changed = threading.Event()

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        if len(self.found) >= _MAX_FOUND or not name.startswith(f"{self._purpose}-"):
            return
        info = zc.get_service_info(type_, name, _INFO_MS)
        if info is None or not info.port:
            return
        properties = info.decoded_properties
        hosts = tuple(info.parsed_scoped_addresses(IPVersion.V4Only) + info.parsed_scoped_addresses(IPVersion.V6Only))
        self.found[name] = Sighting(str(properties.get("for")), str(properties.get("fp")), hosts[:8], info.port)
        self.changed.set()

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.found.pop(name, None)


def own_addresses() -> list[str]:
    """The addresses of this device's interfaces, loopback only where there is nothing else."""
    found = [ip.ip if isinstance(ip.ip, str) else ip.ip[0] for adapter in ifaddr.get_adapters() for ip in adapter.ips]
    others = [one for one in found if one != "::1" and not one.startswith("127.")]
    return others or ["127.0.0.1"]


def listen(port: int) -> socket.socket:
    """A listening socket on every address, IPv4 and IPv6 where the system has it. Raises OSError."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=16)
    return socket.create_server(("", port), backlog=16)
