"""A device that works for a cluster: it listens, lets in who is paired, and serves one leader at a time.

Whoever is not paired is refused within the TLS handshake. Connections are bounded in number and in time until they
have said what they want. Knows nothing of what a session computes (tensorpar/session.py).
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from typing import Any

from edgert.errors import ClusterError
from edgert.paths import Paths
from edgert.version import VERSION
from tensorpar.frames import BadFrame, Kind
from tensorpar.identity import is_one_of
from tensorpar.link import Link
from tensorpar.members import Membership
from tensorpar.mesh import Mesh
from tensorpar.messages import text
from tensorpar.profile import Profile
from tensorpar.pulse import Pulse
from tensorpar.session import OpenEngine, Session
from tensorpar.slice_cache import SliceCache

_GREETING_S = 5.0
# A leader needs two, `status` one; the rest is for those that come and are refused.
_MAX_CONNECTIONS = 16
_ACCEPT_S = 0.25
# Memory is for one leader's part. A session that computes ends after its block; a leader waits 10 s for the greeting.
_HANDOVER_S = 8.0
# One line about refused clients in this time: a scan must not fill the disk.
_LOG_EVERY_S = 10.0
_log = logging.getLogger(__name__)


class Worker:
    """Serves at a listening socket until `stop`. Who is paired is read anew for each client."""

    def __init__(self, server: socket.socket, paths: Paths, profile: Profile, open_engine: OpenEngine,
                 cache: SliceCache | None = None) -> None:
        self._server, self._paths, self._profile, self._open_engine = server, paths, profile, open_engine
        self._cache = cache or SliceCache(paths)
        self._stopped = threading.Event()
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._session_id = ""
        self._last_error = ""
        self._logged_s = float("-inf")
        self._n_refused = 0

    def serve(self) -> None:
        """Accept clients, each in a thread of its own, until `stop`."""
        self._server.settimeout(_ACCEPT_S)
        while not self._stopped.is_set():
            try:
                connection, address = self._server.accept()
            except TimeoutError:
                continue
            except OSError:
                break
            if not self._places.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._greet, args=(connection, str(address[0])), name="client", daemon=True).start()
        self._server.close()

    def stop(self) -> None:
        self._stopped.set()
        with self._lock:
            if self._session is not None:
                self._session.end()

    def _greet(self, connection: socket.socket, host: str) -> None:
        try:
            connection.settimeout(_GREETING_S)
            membership = Membership.load(self._paths)
            if membership is None:
                raise ClusterError("this device is not paired")
            with self._lock:
                mesh = None if self._session is None else self._session.mesh
            introduced = [] if mesh is None else mesh.certificates
            tls = membership.identity.answer(connection, [*(one.certificate for one in membership.members),
                                                          *introduced])
            self._admit(tls, membership, mesh)
        except (ClusterError, OSError) as error:
            connection.close()
            self._refused(host, error)
        finally:
            self._places.release()

    def _admit(self, tls: ssl.SSLSocket, membership: Membership, mesh: Mesh | None) -> None:
        """What a paired client wants, or one that the leader has introduced. Heartbeats and links between workers stay
        open; everything else ends with this call."""
        link = Link(tls)
        try:
            hello = link.receive_message(Kind.HELLO, within_s=_GREETING_S)[1]
            is_paired = is_one_of(tls, [one.certificate for one in membership.members])
            match hello.get("purpose"):
                case "rank" if mesh is not None:
                    mesh.admit(tls, link, hello)
                    return
                case _ if not is_paired:
                    raise BadFrame("an introduced client that wants more")
                case "work":
                    self._work(link, text(hello, "session", 64), membership)
                case "pulse":
                    with self._lock:
                        session = self._session if text(hello, "session", 64) == self._session_id else None
                    if session is not None:
                        session.attach(Pulse(tls, 0))
                        return
                case "status":
                    link.send_message(Kind.STATUS, self.status(membership))
                case _:
                    raise BadFrame("a client with an unknown purpose")
        except BaseException:
            link.close()
            raise
        link.close()

    def _work(self, link: Link, session_id: str, membership: Membership) -> None:
        """Run a session in this thread; one that is still there belongs to a leader that has gone, or asks twice."""
        hello = {"version": VERSION, "name": membership.name, "profile": self._profile.to_dict(),
                 "slices": self._cache.keys()}
        session = Session(link, self._cache, self._open_engine, hello, membership.identity)
        with self._lock:
            before, self._session, self._session_id = self._session, session, session_id
        if before is not None:
            before.end(_HANDOVER_S)
        _log.info("a leader has come")
        why = session.run()
        _log.info("the leader has gone: %s", why)
        with self._lock:
            self._last_error = why
            if self._session is session:
                self._session, self._session_id = None, ""

    def status(self, membership: Membership) -> dict[str, Any]:
        """What `edgert cluster status` shows of this device."""
        with self._lock:
            session, last_error = self._session, self._last_error
        return {"version": VERSION, "name": membership.name, "profile": self._profile.to_dict(),
                "n_slices": len(self._cache.keys()), "time_s": time.time(), "last_error": last_error,
                "session": None if session is None else session.status()}

    def _refused(self, host: str, error: Exception) -> None:
        self._n_refused += 1
        now_s = time.monotonic()
        if now_s - self._logged_s >= _LOG_EVERY_S:
            self._logged_s = now_s
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            _log.warning("%s was refused (%d so far): %s", host, self._n_refused, said)
