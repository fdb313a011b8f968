"""What the processor is, how large its caches are, and how many threads compute fastest: one for each physical core
that this process may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_CPUINFO = Path("/proc/cpuinfo")
_UNITS = {"K": 2**10, "M": 2**20}


def cpu_model(cpuinfo: Path = _CPUINFO) -> str:
    """The processor's name, empty where the system does not say."""
    try:
        with cpuinfo.open() as lines:
            names = (line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "CPU part")))
            return next(names, "")
    except OSError:
        return ""


def usable_cores(topology: Path = _TOPOLOGY, cpu_max: Path = _CPU_MAX) -> int:
    """Physical cores that the affinity mask and the control group's CPU limit leave. At least 1.

    Two threads of one core share its arithmetic units; a second one gains nothing in matrix products.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_core(topology / f"cpu{cpu}" / "topology", cpu) for cpu in cpus}
    return max(1, min(len(cores), _limit(cpu_max, len(cores))))


def largest_cache_bytes(topology: Path = _TOPOLOGY) -> int:
    """The first processor's largest cache, which others may share; 0 where the system does not say."""
    sizes = [0]
    for path in topology.glob("cpu0/cache/index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text().strip()
            sizes.append(int(text.rstrip("KM")) * _UNITS.get(text[-1:], 1))
    return max(sizes)


def _core(directory: Path, cpu: int) -> tuple[str, str]:
    try:
        return ((directory / "physical_package_id").read_text().strip(), (directory / "core_id").read_text().strip())
    except OSError:
        return ("", str(cpu))


def _limit(cpu_max: Path, n_cores: int) -> int:
    """Whole CPUs that the control group (v2) grants per period."""
    try:
        quota, period = cpu_max.read_text().split()
        return n_cores if quota == "max" else max(1, int(quota) // max(1, int(period)))
    except (OSError, ValueError):
        return n_cores
