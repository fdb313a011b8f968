"""A worker's side of one leader's session: receive a slice, open it, and follow the leader's passes.

Runs in one thread from the first message to the end of the connection; what it opened is closed with it, whatever
happens. Knows nothing of listening and of certificates (tensorpar/worker.py).
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgert.engine.collective import Collective
from edgert.engine.engine import Engine
from edgert.errors import ClusterError, EdgertError, PeerLost
from tensorpar.collectives import Abandoned, Group, Network
from tensorpar.frames import MAX_DATA_BYTES, BadFrame, Kind
from tensorpar.identity import Identity
from tensorpar.link import Link
from tensorpar.mesh import Mesh
from tensorpar.messages import Introduction, Settings, Setup, network_of_message
from tensorpar.probe import echo
from tensorpar.pulse import Pulse
from tensorpar.slice_cache import SliceCache

# A leader may sit in a conversation for a day; its heartbeats say that it is there.
_IDLE_S = 86400.0
_MAX_CHUNK_BYTES = 2**23
_log = logging.getLogger(__name__)


class OpenEngine(Protocol):
    """Opens the model file at a path as one rank, within the memory that the user has granted."""

    def __call__(self, path: Path, settings: Settings, collective: Collective) -> Engine: ...


class Session:
    """`run` serves one leader until it goes. `status` may be read from another thread."""

    def __init__(self, link: Link, cache: SliceCache, open_engine: OpenEngine, hello: dict[str, Any],
                 identity: Identity | None = None) -> None:
        self._link, self._cache, self._open_engine, self._hello = link, cache, open_engine, hello
        self._identity = identity
        self.mesh: Mesh | None = None
        self._engine: Engine | None = None
        self._opened: tuple[bytes, Settings] | None = None
        self._pulse: Pulse | None = None
        self._ended, self._closed = False, threading.Event()
        self._group: Group | None = None
        self._began_s = time.monotonic()
        self._setup: Setup | None = None
        self._computed_s = 0.0
        self._n_passes = 0
        link.check_alive = self._check_alive

    def attach(self, pulse: Pulse) -> None:
        """The leader's heartbeats, which come on a connection of their own."""
        self._pulse = pulse
        if self._ended:
            pulse.close()

    def _check_alive(self) -> None:
        if self._ended:
            raise PeerLost(0, "another session has begun")
        if self._pulse is not None:
            self._pulse.check()
        elif time.monotonic() - self._began_s > 10:
            raise PeerLost(0, "it sends no heartbeats")

    def end(self, within_s: float = 0.0) -> None:
        """Let `run` return soon, and wait so long for what it has opened to be closed. From any thread."""
        self._ended = True
        self._closed.wait(within_s)

    def run(self) -> str:
        """Serve until the leader goes; why it ended."""
        try:
            self._link.send_message(Kind.READY, self._hello)
            while True:
                self._serve_one()
        except PeerLost as error:
            return error.why
        except BadFrame as error:
            _log.warning("the leader was dropped: %s", error.message)
            return error.problem
        finally:
            self._ended = True
            self._close_mesh()
            self._close_engine()
            self._link.close()
            if self._pulse is not None:
                self._pulse.close()
            self._closed.set()

    def _serve_one(self) -> None:
        """Answer the next frame. A failure of ours is told to the leader; the session goes on."""
        kind = self._link.peek(MAX_DATA_BYTES, _IDLE_S).kind
        try:
            self._answer(kind)
        except Abandoned:
            _log.info("the leader gave a pass up")
        except PeerLost as lost:
            if lost.rank == 0:
                raise
            _log.warning("%s", lost.message)  # it may be there still, for others
            self._close_mesh()
            self._link.send_message(Kind.FAULT, {"problem": lost.message[:300], "lost": lost.rank})
        except BadFrame:
            raise
        except EdgertError as error:
            _log.warning("%s", error.message)
            self._link.send_message(Kind.FAULT, {"problem": error.message[:300], "next_step": error.next_step[:300]})
        except MemoryError:
            self._link.send_message(Kind.FAULT, {"problem": "out of memory", "next_step": ""})

    def _answer(self, kind: Kind) -> None:
        """Do what the next frame, which is of this kind, asks for."""
        match kind:
            case Kind.PROBE:
                echo(self._link)
            case Kind.MEET:
                self._meet(Introduction.of_message(self._link.receive_message(Kind.MEET)[1]))
            case Kind.DIAL if self.mesh is not None:
                self._link.receive_message(Kind.DIAL)
                self._dial(self.mesh)
            case Kind.AGREE:
                self._agree(network_of_message(self._link.receive_message(Kind.AGREE)[1]))
            case Kind.SETUP:
                self._set_up(Setup.of_message(self._link.receive_message(Kind.SETUP)[1]))
            case Kind.PASS if self._engine is not None:
                self._follow(self._engine)
            case Kind.PASS | Kind.PART | Kind.SUM | Kind.CHUNK:  # of something that we could not do, or gave up
                self._link.skip(MAX_DATA_BYTES)
            case _:
                raise BadFrame(f"{kind.name} came")

    def _meet(self, introduction: Introduction) -> None:
        """From here on, the other workers may dial."""
        setup = self._setup
        if setup is None or self._identity is None:
            raise BadFrame("an introduction before a plan")
        self._close_mesh()
        self.mesh = Mesh(introduction, setup.rank, self._identity)
        self._link.send_message(Kind.READY, {})

    def _dial(self, mesh: Mesh) -> None:
        """Connect to the other workers; the leader hears how quick that is, or why it is not possible."""
        try:
            speed = mesh.meet(self._check_alive, self._look)
        except ClusterError as error:
            _log.warning("sums go through the leader: %s", error.message)
            self._link.send_message(Kind.READY, {"problem": error.message[:300]})
            return
        self._link.send_message(Kind.READY, asdict(speed))

    def _agree(self, network: Network) -> None:
        if self._group is None or (network.is_mesh and self.mesh is None):
            raise BadFrame("an agreement on what is not there")
        if not network.is_mesh:
            self._close_mesh()
        self._group.join({} if self.mesh is None else self.mesh.links, network)

    def _look(self) -> bool:
        return self._group is not None and self._group.look()

    def _close_mesh(self) -> None:
        mesh, self.mesh = self.mesh, None
        if mesh is not None:
            mesh.close()

    def _set_up(self, setup: Setup) -> None:
        self._close_mesh()
        group = Group(setup.rank, setup.world_size, {0: self._link}, epoch=setup.epoch, network=setup.network,
                      wire=setup.wire, algorithm=setup.algorithm, splits_head=setup.splits_head)
        wanted = (setup.key, setup.settings)
        if self._engine is not None and self._opened == wanted:  # the others have changed, not this one's part
            self._engine.collective = group
            self._engine.kv.truncate(0)
            self._link.send_message(Kind.READY, {"received": setup.slice_bytes})
        else:
            self._close_engine()
            path = self._receive(setup)
            self._engine = self._open_engine(path, setup.settings, group)
            self._opened = wanted
        self._group, self._setup = group, setup
        self._link.send_message(Kind.READY, {"epoch": setup.epoch})
        _log.info("rank %d of %d", setup.rank, setup.world_size)

    def _receive(self, setup: Setup) -> Path:
        """The slice's file: from the cache, or from the leader, from where an earlier transfer ended."""
        key, link = setup.key, self._link
        if self._cache.has(key):
            link.send_message(Kind.READY, {"received": setup.slice_bytes})
            return self._cache.path(key)
        self._cache.make_room(key, setup.slice_bytes)
        received = self._cache.received_bytes(key)
        if received > setup.slice_bytes:
            raise BadFrame("a slice of another size")
        link.send_message(Kind.READY, {"received": received})
        with self._cache.append(key) as file:
            while received < setup.slice_bytes:
                header = link.peek(min(_MAX_CHUNK_BYTES, setup.slice_bytes - received))
                if header.kind is not Kind.CHUNK:
                    raise BadFrame(f"{header.kind.name} came within a slice")
                chunk = memoryview(bytearray(header.n_bytes))
                link.take(chunk)
                file.write(chunk)
                received += len(chunk)
        digest = link.receive_message(Kind.READY)[1].get("sha256")
        return self._cache.finish(key, bytes.fromhex(digest) if isinstance(digest, str) else b"")

    def _follow(self, engine: Engine) -> None:
        assert self._group is not None  # set up together with the engine
        start = self._group.follow()
        engine.kv.truncate(start.start)
        n_outputs_most = min(start.n_tokens, engine.batch_size)
        if (engine.kv.length != start.start or start.n_tokens > engine.kv.context_length
                or not 1 <= start.n_outputs <= n_outputs_most):
            raise BadFrame(f"a pass of {start.n_tokens} tokens at {start.start}, {engine.kv.length} are held")
        began_s, waited_s = time.monotonic(), self._group.waited_s
        engine.step(np.zeros(start.n_tokens, np.int32), start.n_outputs)
        self._computed_s += time.monotonic() - began_s - (self._group.waited_s - waited_s)
        self._n_passes += 1

    def _close_engine(self) -> None:
        engine, self._engine, self._opened = self._engine, None, None
        if engine is not None:
            engine.close()

    def status(self) -> dict[str, Any]:
        """Role and figures since the session began."""
        setup = self._setup
        return {"rank": None if setup is None else setup.rank,
                "world_size": None if setup is None else setup.world_size,
                "slice_bytes": 0 if setup is None else setup.slice_bytes, "n_passes": self._n_passes,
                "compute_s": round(self._computed_s, 3), "sent_bytes": self._link.sent_bytes,
                "received_bytes": self._link.received_bytes, "session_s": round(time.monotonic() - self._began_s, 1)}


