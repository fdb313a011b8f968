"""Runs a command as a small device would: in a control group (v1 or v2) with a memory limit, page cache included, and
with a slow disk.

Needs root. For measurements (`edgert bench --limit`, benchmarks/); the limit that a user sets is `--memory`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_REMOVE_TRIES, _REMOVE_PAUSE_S = 50, 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the command printed, how it ended, and what the group counted."""

    stdout: str
    returncode: int
    peak_bytes: int
    limit_hits: int
    oom_kills: int
    read_bytes: int


class MemoryGroup:
    """A control group with a limit. A process enters it by writing its id into `processes`."""

    def __init__(self, directory: Path, is_unified: bool) -> None:
        self.processes, self._directory, self._is_unified = directory / "cgroup.procs", directory, is_unified

    @property
    def peak_bytes(self) -> int:
        """The most memory that it was charged with, page cache included."""
        return int((self._directory / ("memory.peak" if self._is_unified else "memory.max_usage_in_bytes")).read_text())

    @property
    def limit_hits(self) -> int:
        if self._is_unified:
            return _count(self._directory / "memory.events", "max")
        return int((self._directory / "memory.failcnt").read_text())

    @property
    def oom_kills(self) -> int:
        return _count(self._directory / ("memory.events" if self._is_unified else "memory.oom_control"), "oom_kill")


def why_impossible(root: Path = _ROOT) -> str | None:
    """Why this process may not make a memory control group; None where it may."""
    directory = root if (root / "cgroup.controllers").exists() else root / "memory"
    if not directory.is_dir():
        return f"there are no memory control groups at {directory}"
    if os.geteuid() != 0 or not os.access(directory, os.W_OK):
        return f"only root makes control groups, where {directory} can be written"
    return None


def is_possible() -> bool:
    """Whether this process may make a memory control group."""
    return why_impossible() is None


def drop_page_cache() -> None:
    """Forget every cached file, so that no run profits from the one before."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A group with this limit and without swap, removed in any case."""
    with _group("memory", "memory") as (directory, is_unified):
        (directory / ("memory.max" if is_unified else "memory.limit_in_bytes")).write_text(str(limit_bytes))
        swap = directory / ("memory.swap.max" if is_unified else "memory.swappiness")
        if swap.exists():
            swap.write_text("0")
        yield MemoryGroup(directory, is_unified)


def run_limited(command: Sequence[str], limit_bytes: int, timeout_s: float, *, disk: Path | None = None,
                environment: Mapping[str, str] | None = None) -> Outcome:
    """Run `command` in a group of its own, and in the group of `slow_disk` that `disk` names. Raises TimeoutExpired;
    the group is removed in any case."""
    with memory_group(limit_bytes) as group:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=False,
                              env=None if environment is None else {**os.environ, **environment},
                              preexec_fn=lambda: _enter([group.processes, *([disk] if disk else [])]))
        read = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock - before) * 512
        return Outcome(done.stdout, done.returncode, group.peak_bytes, group.limit_hits, group.oom_kills, read)


def _enter(groups: Sequence[Path]) -> None:
    for processes in groups:
        processes.write_text(str(os.getpid()))


@contextmanager
def slow_disk(path: Path, read_bytes_s: int) -> Iterator[Path]:
    """A group whose processes read the disk that holds `path` at most so fast: write their ids to the file given."""
    with _group("io", "blkio") as (directory, is_unified):
        limit, text = (("io.max", f"{_disk_of(path)} rbps={read_bytes_s}") if is_unified else
                       ("blkio.throttle.read_bps_device", f"{_disk_of(path)} {read_bytes_s}"))
        (directory / limit).write_text(text)
        yield directory / "cgroup.procs"


@contextmanager
def _group(controller: str, controller_v1: str) -> Iterator[tuple[Path, bool]]:
    """A group without limits where they can be set, and whether it is of version 2; removed in any case."""
    is_unified = (_ROOT / "cgroup.controllers").exists()
    if is_unified:
        (_ROOT / "cgroup.subtree_control").write_text(f"+{controller}")
    directory = (_ROOT if is_unified else _ROOT / controller_v1) / f"edgert-{os.getpid()}-{time.monotonic_ns()}"
    directory.mkdir()
    try:
        yield directory, is_unified
    finally:
        _remove(directory)


def _disk_of(path: Path) -> str:
    """major:minor of the whole disk that holds `path`: partitions have no limits of their own."""
    device = path.stat().st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    return ((node.parent if (node / "partition").exists() else node) / "dev").read_text().strip()


def _count(path: Path, key: str) -> int:
    return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(key + " ")), 0)


def _remove(group: Path) -> None:
    for _ in range(_REMOVE_TRIES):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(_REMOVE_PAUSE_S)
