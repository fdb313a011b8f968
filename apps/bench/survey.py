"""What is measured of the device before anything runs: its profile for predictions, and its disk.

In a process of its own (worker.py), since kernels and buffers for it would count as a contender's memory.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from apps.bench.contenders import Setup
from apps.bench.environment import environment
from edgert.paths import Paths
from edgert.planning import Planning

_N_DISK_PARTS = 3  # a disk's speed moves within a second; each part is a sample


def survey(path: Path, disk_s: float, setups: Sequence[Setup]) -> dict[str, Any]:
    """The environment block, with the disk of `path`, which is read for `disk_s`; and the device calibrated for this
    model as these setups run it, unless it is (10 s at most for each). Raises what planning raises."""
    for setup in setups:
        with Planning.open(path, Paths.of_user(), replace(setup.engine_options(), memory_bytes=None)) as planning:
            planning.calibrate()
    return {**environment(), "disk": disk(path, disk_s)}


def disk(path: Path, seconds: float) -> dict[str, Any]:
    """Raw bandwidth of the disk that holds `path`, every sample, with what the kernel says of it."""
    from offload.disk_speed import measure_bandwidth

    samples = [measure_bandwidth(path, 4, seconds / _N_DISK_PARTS) for _ in range(_N_DISK_PARTS)]
    return {"bytes_s": statistics.median(samples), "samples_bytes_s": samples, "read_ahead_kib": _read_ahead(path)}


def _read_ahead(path: Path) -> int | None:
    device = path.stat().st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for directory in (node, node.parent):
        try:
            return int((directory / "queue/read_ahead_kb").read_text())
        except (OSError, ValueError):
            continue
    return None
