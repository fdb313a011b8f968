"""A worker serves one leader at a time: who comes next is greeted when nothing of the one before is left."""

from __future__ import annotations

import select
import socket
import threading
from pathlib import Path

import pytest

from benchmarks.cluster_processes import DEADLINE_S, paths_under
from tensorpar.frames import Kind, Moment
from tensorpar.link import Link
from tensorpar.members import Membership
from tensorpar.profile import Profile
from tensorpar.session import Session
from tensorpar.worker import Worker

PROFILE = Profile({0: 1e-10}, 1e-10, 1e9, 2**30, 1)


def test_the_next_leader_waits_until_memory_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computes, may_end, closed = threading.Event(), threading.Event(), list[str]()

    def compute(session: Session, _: Kind) -> None:
        session._link.skip(0)
        computes.set()
        assert may_end.wait(DEADLINE_S)

    monkeypatch.setattr(Session, "_answer", compute)
    monkeypatch.setattr(Session, "_close_engine", lambda _: closed.append("engine"))
    paths = paths_under(tmp_path)
    membership = Membership.create(paths, "worker", "worker")

    def no_engine(*_: object) -> None:
        raise AssertionError

    worker = Worker(socket.create_server(("127.0.0.1", 0)), paths, PROFILE, no_engine)  # type: ignore[arg-type]
    pairs = [socket.socketpair() for _ in range(2)]
    leaders = [Link(theirs) for _, theirs in pairs]
    served = [threading.Thread(target=worker._work, args=(Link(ours), str(number), membership))
              for number, (ours, _) in enumerate(pairs)]
    served[0].start()
    leaders[0].receive_message(Kind.READY, within_s=DEADLINE_S)
    leaders[0].send(Kind.PROBE, Moment(0))
    assert computes.wait(DEADLINE_S)
    served[1].start()
    assert not select.select([pairs[1][1]], [], [], 0.05)[0] and not closed
    may_end.set()
    leaders[1].receive_message(Kind.READY, within_s=DEADLINE_S)
    assert closed == ["engine"]
    for leader in leaders:
        leader.close()
    for thread in served:
        thread.join(DEADLINE_S)
    worker._server.close()
