"""Heartbeats: a connection of its own on which both sides say twice a second that they live.

A device that is stopped or cut off falls silent on it, however long its computation may take; one that ends closes it
at once. A thread per peer, which ends with `close`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from edgert.errors import PeerLost
from tensorpar.frames import HEADER_BYTES, BadFrame, Kind, Moment, pack, unpack
from tensorpar.link import tune

EVERY_S = 0.5
# Wi-Fi that saves power holds packets back for 0.3 s; this leaves room for several and stays under 3 s.
SILENT_AFTER_S = 2.5
# When this device itself has not run for so long (it was suspended, or stopped), the silence says nothing about others.
_ASLEEP_AFTER_S = 1.5
_FRAME = pack(Kind.PULSE, Moment(0), 0)


class Pulse:
    """Whether the device of `rank` lives. `check` raises PeerLost when it does not."""

    def __init__(self, sock: socket.socket, rank: int) -> None:
        self._socket, self.rank = sock, rank
        tune(sock)
        sock.settimeout(EVERY_S)
        self._seen_s = self._awake_s = time.monotonic()
        self._lost = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"pulse {rank}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        now_s = time.monotonic()
        silent_s = now_s - self._seen_s
        if self._lost:
            raise PeerLost(self.rank, self._lost)
        if silent_s > SILENT_AFTER_S and now_s - self._awake_s < _ASLEEP_AFTER_S:
            raise PeerLost(self.rank, f"nothing was heard of it for {silent_s:.1f} s")

    def _beat(self) -> None:
        raw, sent_s = b"", 0.0
        try:
            while not self._closed.is_set():
                now_s = time.monotonic()
                if now_s - self._awake_s > _ASLEEP_AFTER_S:
                    self._seen_s = now_s
                self._awake_s = now_s
                if now_s - sent_s >= EVERY_S:
                    self._socket.sendall(_FRAME)
                    sent_s = now_s
                try:
                    data = self._socket.recv(4096)
                except TimeoutError:
                    continue
                if not data:
                    raise PeerLost(self.rank, "it ended")
                raw += data
                while len(raw) >= HEADER_BYTES:
                    if unpack(raw[:HEADER_BYTES], 0).kind is not Kind.PULSE:
                        raise BadFrame("no heartbeat")
                    raw = raw[HEADER_BYTES:]
                    self._seen_s = time.monotonic()
        except PeerLost as error:
            self._lost = error.why
        except (OSError, BadFrame) as error:
            self._lost = str(getattr(error, "strerror", None) or error)

    def close(self) -> None:
        """End the heartbeats; the other side notices at once."""
        self._closed.set()
        with contextlib.suppress(OSError):  # the other side was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(4 * EVERY_S)
        self._socket.close()
