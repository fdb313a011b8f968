"""What this process holds and what the machine has left, control groups included.

Reads /proc and /sys; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_SHORT_SHARE = 0.1  # a machine with less than this available is short of memory
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

    def mapped_files(self) -> list[Path]:
        """The files of which this process has mapped a part: libraries, mostly."""
        try:
            lines = (self._proc / "self/maps").read_text().splitlines()
        except OSError:
            return []
        return sorted({Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6
                       and fields[5].startswith("/")})

    def available_bytes(self) -> int:
        """What could be taken without driving others out: MemAvailable, or what the control groups leave."""
        return min([self._meminfo("MemAvailable"), *(group.left_bytes for group in self._limited_groups())])

    def stalled_percent(self) -> float:
        """Percent of the last 10 s in which some task of this control group (v2) waited for memory, or else of the
        machine (PSI, https://docs.kernel.org/accounting/psi.html); 0 where the kernel does not tell.

        The machine's counts only when it is short of memory itself: tasks also wait in groups that have nothing to do
        with us, and giving memory back would not help them.
        """
        paths = [group / "memory.pressure" for group in self._unified_groups()[:1]]
        if self._meminfo("MemAvailable") < _SHORT_SHARE * self._meminfo("MemTotal"):
            paths.append(self._proc / "pressure/memory")
        for path in paths:
            try:
                some = next(line for line in path.read_text().splitlines() if line.startswith("some "))
                return float(dict(field.split("=", 1) for field in some.split()[1:])["avg10"])
            except (OSError, StopIteration, ValueError, KeyError):
                continue
        return 0.0

    def control_group(self) -> ControlGroup | None:
        """The tightest limit on this process, v1 or v2; None without one."""
        return min(self._limited_groups(), key=lambda group: group.limit_bytes, default=None)

    def _unified_groups(self) -> list[Path]:
        """Directories of the control group (v2) and of those above it."""
        try:
            lines = (self._proc / "self/cgroup").read_text().splitlines()
        except OSError:
            return []
        return [directory for line in lines if line.startswith("0::")
                for directory in _upwards(self._cgroup, line.removeprefix("0::"))]

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
