"""Whether other programs compute on this process's processors while it measures something.

Reads /proc/stat (proc(5)) and this process's own time; where the system does not tell, nobody is seen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_STAT = Path("/proc/stat")
# Of the processors' time. Daemons of a desktop that nobody uses take a hundredth; one busy thread beside two takes
# a half of it from them, or a third where it has a low priority.
_MOST_SHARE = 0.1
# Fields of a processor's line: user, nice, system, idle, iowait, irq, softirq, steal (a host's other guests), and two
# that are counted in user and nice already.
_N_FIELDS, _IDLE = 8, (3, 4)


class Neighbours:
    """What others have computed since it was made."""

    def __init__(self, stat: Path = _STAT, own_s: Callable[[], float] = time.process_time) -> None:
        self._stat, self._own_s = stat, own_s
        self._cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
        self._busy_s, self._total_s = self._read()
        self._own_before_s = own_s()

    @property
    def share(self) -> float:
        """Of the time of this process's processors, from 0 to 1."""
        busy_s, total_s = self._read()
        others_s = busy_s - self._busy_s - (self._own_s() - self._own_before_s)
        passed_s = total_s - self._total_s
        return min(1.0, max(0.0, others_s / passed_s)) if passed_s > 0 else 0.0

    @property
    def disturb(self) -> bool:
        """Whether they took so much that what was measured meanwhile is not to be believed."""
        return self.share > _MOST_SHARE

    def _read(self) -> tuple[float, float]:
        """Seconds that the processors were busy, and all of them."""
        try:
            lines = [line.split() for line in self._stat.read_text().splitlines() if line.startswith("cpu")]
            ticks = [[int(field) for field in fields[:_N_FIELDS]] for name, *fields in lines
                     if name[3:].isdecimal() and int(name[3:]) in self._cpus]
        except (OSError, ValueError):
            return 0.0, 0.0
        total, idle = sum(map(sum, ticks)), sum(sum(of_cpu[index] for index in _IDLE) for of_cpu in ticks)
        per_s = os.sysconf("SC_CLK_TCK")
        return (total - idle) / per_s, total / per_s
