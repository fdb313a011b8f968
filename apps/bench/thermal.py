"""How warm the device is and how fast its clocks run: readings, and whether a clock dropped while something ran.

Reads files below `root`, so that tests bring recorded trees; what a system does not tell is None.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_CPU = "sys/devices/system/cpu"
# Below this share of the highest clock seen before, and in two samples: one is the governor's breath.
_DROPPED_BELOW, _N_LOW, _N_RAMP = 0.9, 2, 3
_TOOL_DEADLINE_S = 5.0
_PROCESSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")  # drivers in hwmon


def temperature_sensors(root: Path = Path("/")) -> list[Path]:
    """Files that tell millidegrees: thermal zones, or else hwmon's sensors of processors."""
    zones = [zone for zone in sorted(root.glob("sys/class/thermal/thermal_zone*/temp")) if _number(zone) is not None]
    return zones or [sensor for name in sorted(root.glob("sys/class/hwmon/hwmon*/name"))
                     if _text(name) in _PROCESSORS for sensor in sorted(name.parent.glob("temp*_input"))]


def clocks(root: Path = Path("/")) -> list[Path]:
    """Files that tell each core's clock in kHz, as its governor sets it."""
    return sorted(root.glob(f"{_CPU}/cpu[0-9]*/cpufreq/scaling_cur_freq"))


def warmest_c(sensors: Sequence[Path]) -> float | None:
    """The highest temperature; None without any. A sensor that is switched off tells 0, or -256 on a Jetson."""
    return max((value / 1000 for value in map(_number, sensors) if value is not None and value > 0), default=None)


def fastest_mhz(sensors: Sequence[Path]) -> float | None:
    """The highest clock; None without any."""
    return max((value / 1000 for value in map(_number, sensors) if value), default=None)


def throttle_count(root: Path = Path("/")) -> int | None:
    """How often Intel's processors have slowed down for heat since the system began."""
    counts = [_number(path) for path in root.glob(f"{_CPU}/cpu[0-9]*/thermal_throttle/package_throttle_count")]
    return max((count for count in counts if count is not None), default=None)


def governor(root: Path = Path("/")) -> str | None:
    """The policy of the first core's clock."""
    return _text(root / _CPU / "cpu0/cpufreq/scaling_governor") or None


def power_mode(tool: str = "nvpmodel") -> str | None:
    """A Jetson's power mode (`MAXN`, `15W`), as NVIDIA's tool tells it; None elsewhere."""
    path = shutil.which(tool)
    if path is None:
        return None
    try:
        told = subprocess.run([path, "-q"], capture_output=True, text=True, timeout=_TOOL_DEADLINE_S,
                              check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    modes = (line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("NV Power Mode"))
    return next(modes, "")[:64] or None


def clock_dropped(windows: Sequence[Sequence[float]]) -> bool:
    """Whether the clock fell, and stayed down, within the timed windows' samples of 100 ms.

    What it was between two windows does not count, nor how a window begins: an idle core is slow by itself, and speeds
    up with the work.
    """
    highest = 0.0
    for clocks in windows:
        n_low = 0
        for number, clock in enumerate(clocks):
            highest = max(highest, clock)
            n_low = n_low + 1 if number >= _N_RAMP and clock < _DROPPED_BELOW * highest else 0
            if n_low >= _N_LOW:
                return True
    return False


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
