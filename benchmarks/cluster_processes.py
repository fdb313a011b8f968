"""A cluster on loopback for tests: workers as processes of their own, paired without the ceremony of codes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from edgert.ggml.backend import Backend
from edgert.ggml.library import load_libraries
from edgert.memory.profile import DeviceProfile
from edgert.memory.profile_store import ProfileStore
from edgert.paths import Paths
from offload.disk_speed import disk_key
from tensorpar.members import Member, Membership

DEADLINE_S = 120.0  # for a busy machine; only a failing test waits so long
_START = "import sys; from apps.cli.main import main; sys.exit(main())"


def paths_under(home: Path) -> Paths:
    return Paths(home / "models", home / "config", home / "cache")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass(slots=True)
class WorkerProcess:
    """`edgert cluster up` in a process; started with `start`, which waits until it listens."""

    name: str
    home: Path
    port: int
    options: Sequence[str] = ()
    prefix: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        self.process = subprocess.Popen(
            [*self.prefix, sys.executable, "-c", _START, "-v", "cluster", "up", "--port", str(self.port), "--threads",
             "1", *self.options], stdout=subprocess.PIPE, stderr=(self.home / "log").open("ab"),
            env={**os.environ, "EDGERT_HOME": str(self.home)})
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert b"works on port" in line, (line, self.log())
        return self

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        assert self.process is not None
        process, self.process = self.process, None
        status = process.wait(DEADLINE_S)
        assert process.stdout is not None
        process.stdout.close()
        return status

    def log(self) -> str:
        return (self.home / "log").read_text()


@dataclass(slots=True)
class TestCluster:
    """A leader's home, and its workers."""

    __test__ = False

    leader_home: Path
    workers: list[WorkerProcess] = field(default_factory=list)

    @property
    def leader_paths(self) -> Paths:
        return paths_under(self.leader_home)

    def close(self) -> None:
        for one in self.workers:
            one.kill()


def pair(leader_home: Path, worker_home: Path, name: str, host: str, port: int) -> None:
    """What `invite` and `join` leave behind on both sides."""
    leader = Membership.create(paths_under(leader_home), "leader", "leader")
    worker = Membership.create(paths_under(worker_home), "worker", name)
    leader.with_member(Member(name, worker.identity.certificate, host, port))
    worker.with_member(Member("leader", leader.identity.certificate))


def as_if_measured(home: Path) -> None:
    """Spare the processes of this home the seconds in which a device is measured, where speed is no matter."""
    load_libraries()
    backend = Backend(1)
    types = {str(number): {1: 1e-10} for number in (0, 1, 2, 8, 12, 13, 14)}
    nominal = DeviceProfile({f"{number}/plain": sizes for number, sizes in types.items()},
                            {size: {1: 1e-10} for size in (16, 32, 64, 128, 256)})
    home.mkdir(parents=True, exist_ok=True)
    ProfileStore(paths_under(home).cache / "device.json").save(backend.speed_key, disk_key(home), nominal)
    backend.close()


@contextmanager
def cluster(directory: Path, n_workers: int, options: Sequence[str] = (), *,
            measured: bool = True) -> Iterator[TestCluster]:
    """A leader's home and running workers on loopback. Without `measured`, all devices count as equal."""
    made = TestCluster(directory / "leader")
    try:
        if not measured:
            as_if_measured(made.leader_home)
        for number in range(1, n_workers + 1):
            home, port = directory / f"worker{number}", free_port()
            pair(made.leader_home, home, f"worker{number}", "127.0.0.1", port)
            if not measured:
                as_if_measured(home)
            made.workers.append(WorkerProcess(f"worker{number}", home, port, ("--no-mdns", *options)))
        for one in made.workers:
            one.start()
        yield made
    finally:
        made.close()
