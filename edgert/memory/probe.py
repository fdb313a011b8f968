"""What this process holds and what the machine has left, control groups included.

Reads /proc and /sys; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_UNLIMITED_BYTES = 2**60  # control groups v1 write a number near 2**63 for "no limit"


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """A control group above this process: its limit, what it is charged with, page cache included, and how much of
    that are cached files that nobody has used for a while."""

    limit_bytes: int
    usage_bytes: int
    idle_cache_bytes: int = 0

    @property
    def left_bytes(self) -> int:
        """What could be taken: idle cache gives way, as it does in the machine's MemAvailable."""
        return max(0, self.limit_bytes - self.usage_bytes + self.idle_cache_bytes)


class MemoryProbe:
    """The real device. `root` is where /proc and /sys lie, for tests."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc, self._cgroup = root / "proc", root / "sys/fs/cgroup"

    def process_bytes(self) -> int:
        """Resident memory of this process: anonymous and file pages."""
        return self._status("VmRSS")

    def available_bytes(self) -> int:
        """What could be taken without driving others out: MemAvailable, or what the control groups leave."""
        return min([self._meminfo("MemAvailable"), *(group.left_bytes for group in self._limited_groups())])

    def control_group(self) -> ControlGroup | None:
        """The tightest limit on this process, v1 or v2; None without one."""
        return min(self._limited_groups(), key=lambda group: group.limit_bytes, default=None)

    def _limited_groups(self) -> list[ControlGroup]:
        try:
            lines = (self._proc / "self/cgroup").read_text().splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            controllers, _, path = line.partition(":")[2].partition(":")
            if controllers == "":
                found += [_read_v2(directory) for directory in _upwards(self._cgroup, path)]
            elif "memory" in controllers.split(","):
                found += [_read_v1(directory) for directory in _upwards(self._cgroup / "memory", path)]
        return [group for group in found if group is not None]

    def _status(self, key: str) -> int:
        return _kib(self._proc / "self/status", key)

    def _meminfo(self, key: str) -> int:
        return _kib(self._proc / "meminfo", key)


def _kib(path: Path, key: str) -> int:
    """The value of `key: N kB`, in bytes; 0 where the system does not say."""
    try:
        line = next(line for line in path.read_text().splitlines() if line.startswith(key + ":"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def _upwards(root: Path, path: str) -> list[Path]:
    """The group's directory and those above it. The root too: in a container it is the container's own group."""
    names = [name for name in path.split("/") if name not in ("", "..")]
    return [root.joinpath(*names[:depth]) for depth in range(len(names), -1, -1)]


def _read_v2(group: Path) -> ControlGroup | None:
    return _read(group, "memory.max", "memory.current", "inactive_file")


def _read_v1(group: Path) -> ControlGroup | None:
    return _read(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _read(group: Path, limit: str, usage: str, idle_cache: str) -> ControlGroup | None:
    """None where there is no limit, or no such group (a path that only the host knows)."""
    try:
        text = (group / limit).read_text().strip()
        if text == "max" or int(text) > _UNLIMITED_BYTES:
            return None
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return ControlGroup(int(text), int((group / usage).read_text()), int(stat.get(idle_cache, 0)))
    except (OSError, ValueError):
        return None
