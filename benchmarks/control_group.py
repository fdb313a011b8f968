"""Runs a command as a small device would: in a control group (v1 or v2) with a memory limit, page cache included, and
with a slow disk.

Needs root. For measurements; the limit that a user sets is `--memory`.
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


def is_possible() -> bool:
    """Whether this process may make a memory control group."""
    directory = _ROOT if (_ROOT / "cgroup.controllers").exists() else _ROOT / "memory"
    return os.access(directory, os.W_OK) and os.geteuid() == 0


def drop_page_cache() -> None:
    """Forget every cached file, so that no run profits from the one before."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def run_limited(command: Sequence[str], limit_bytes: int, timeout_s: float, *, disk: Path | None = None,
                environment: Mapping[str, str] | None = None) -> Outcome:
    """Run `command` in a group of its own, and in the group of `slow_disk` that `disk` names. Raises TimeoutExpired;
    the group is removed in any case."""
    unified = (_ROOT / "cgroup.controllers").exists()
    group = (_ROOT if unified else _ROOT / "memory") / f"edgert-{os.getpid()}-{time.monotonic_ns()}"
    if unified:
        (_ROOT / "cgroup.subtree_control").write_text("+memory")
    group.mkdir()
    try:
        (group / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(limit_bytes))
        swap = group / ("memory.swap.max" if unified else "memory.swappiness")
        if swap.exists():
            swap.write_text("0")
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=False,
                              env=None if environment is None else {**os.environ, **environment},
                              preexec_fn=lambda: _enter([group / "cgroup.procs", *([disk] if disk else [])]))
        read = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock - before) * 512
        events, kills = (group / "memory.events", group / "memory.events") if unified else \
            (group / "memory.failcnt", group / "memory.oom_control")
        return Outcome(done.stdout, done.returncode,
                       int((group / ("memory.peak" if unified else "memory.max_usage_in_bytes")).read_text()),
                       _count(events, "max") if unified else int(events.read_text()), _count(kills, "oom_kill"), read)
    finally:
        _remove(group)


def _enter(groups: Sequence[Path]) -> None:
    for processes in groups:
        processes.write_text(str(os.getpid()))


@contextmanager
def slow_disk(path: Path, read_bytes_s: int) -> Iterator[Path]:
    """A group whose processes read the disk that holds `path` at most so fast: write their ids to the file given."""
    unified = (_ROOT / "cgroup.controllers").exists()
    group = (_ROOT if unified else _ROOT / "blkio") / f"edgert-{os.getpid()}-{time.monotonic_ns()}"
    if unified:
        (_ROOT / "cgroup.subtree_control").write_text("+io")
    group.mkdir()
    try:
        limit, text = (("io.max", f"{_disk_of(path)} rbps={read_bytes_s}") if unified else
                       ("blkio.throttle.read_bps_device", f"{_disk_of(path)} {read_bytes_s}"))
        (group / limit).write_text(text)
        yield group / "cgroup.procs"
    finally:
        _remove(group)


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
