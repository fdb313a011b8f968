"""Whether other programs compute on this process's processors while it measures something.

What processors did (psutil) beyond this process's own time; where the system does not tell, nobody is seen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

# Of the processors' time. Daemons of a desktop that nobody uses take a hundredth; one busy thread beside two takes
# a half of it from them, or a third where it has a low priority.
_MOST_SHARE = 0.1
# Kinds of time that a processor was idle, and those that count in others already: a guest's, as its host sees them.
_IDLE, _COUNTED = ("idle", "iowait"), ("guest", "guest_nice")
Times = Mapping[str, float]  # kind -> seconds


class Neighbours:
    """What others have computed since it was made."""

    def __init__(self, processors: Callable[[], Sequence[Times]] | None = None,
                 own_s: Callable[[], float] = time.process_time) -> None:
        self._processors, self._own_s = processors or _processors, own_s
        self._cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
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
        mine = [times for cpu, times in enumerate(self._processors()) if self._cpus is None or cpu in self._cpus]
        total_s = sum(seconds for times in mine for kind, seconds in times.items() if kind not in _COUNTED)
        return total_s - sum(times.get(kind, 0.0) for times in mine for kind in _IDLE), total_s


def _processors() -> list[Times]:
    """What each of the machine's processors has done since it was started."""
    try:
        return [times._asdict() for times in psutil.cpu_times(percpu=True)]
    except (OSError, psutil.Error):
        return []
