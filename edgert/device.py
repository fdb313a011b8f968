"""This device's profile: what is known of it, and what is missing measured, once.

Part of the composition root: it knows where profiles are kept, who measures kernels, and who measures disks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.engine.calibration import calibrate
from edgert.ggml.backend import Backend
from edgert.gguf.model_file import ModelFile
from edgert.memory.probe import MemoryProbe
from edgert.memory.profile import DeviceProfile
from edgert.memory.profile_store import ProfileStore
from edgert.neighbours import Neighbours
from edgert.paths import Paths

if TYPE_CHECKING:
    from edgert.planning import EngineOptions
    from tensorpar.profile import Profile

_log = logging.getLogger(__name__)
# Kernels, then the disk. Together under 10 s, the first time.
_KERNELS_S, _DISK_S = 7.0, 1.5
# A shorter file tells more of a cache than of its disk.
_LEAST_FILE_BYTES = 2**26


def calibrated(store: ProfileStore, keys: tuple[str, str], backend: Backend, types: Iterable[int], head_dim: int,
               kernels_s: float, disk_file: Path | None, expert_types: Iterable[int] = ()) -> DeviceProfile:
    """What is known of the device and the disk with these `keys`; what is missing is measured, and kept. Kernels for
    so many seconds at the most, and the disk by reading `disk_file`."""
    from offload.disk_speed import measure_disk

    known, disk = store.load(*keys)
    doubtful = known if known is not None and known.is_doubtful else None
    # Corrections of other figures are none of those that are measured now.
    base = known if known is not None and known.is_measured and doubtful is None else None
    others = Neighbours()
    profile = calibrate(backend, base, types, head_dim, kernels_s, expert_types)
    if (disk is None or doubtful) and disk_file is not None:
        disk = measure_disk(disk_file, _DISK_S)
    profile = replace(profile, disk=disk or profile.disk)
    if profile != base and others.disturb:
        profile = profile.disturbed(doubtful)
        if profile.is_doubtful:
            _log.warning("other programs took %.0f %% of the processors while this device was measured: predicted "
                         "speeds may be too low; it is measured again at the next start", 100 * others.share)
    if known is not None:
        profile = replace(profile, curves=known.curves, rehearsals=known.rehearsals)
    if profile != known:
        store.save(*keys, profile)
    return profile


def measured_profile(paths: Paths, n_threads: int, types: Iterable[int], head_dim: int, file: Path) -> DeviceProfile:
    """What this device can do with matrices of these ggml types, heads of this size, and the disk that `file` is on
    (its path need not exist: then the disk is as it was measured before, or nominal)."""
    from offload.disk_speed import disk_key

    backend, where = Backend(n_threads), next(one for one in (file, *file.parents) if one.exists())
    try:
        tells_of_disk = where.is_file() and where.stat().st_size >= _LEAST_FILE_BYTES
        return calibrated(ProfileStore(paths.cache / "device.json"), (backend.speed_key, disk_key(where)), backend,
                          types, head_dim, _KERNELS_S, where if tells_of_disk else None)
    finally:
        backend.close()


def cluster_profile(paths: Paths, options: EngineOptions, types: Iterable[int], head_dim: int, file: Path) -> Profile:
    """What this device tells the others of a cluster about itself."""
    from tensorpar.profile import Profile

    device = measured_profile(paths, options.n_threads, types, head_dim, file)
    probe = MemoryProbe()
    left_bytes = (probe.available_bytes() if options.memory_bytes is None
                  else max(0, options.memory_bytes - probe.process_bytes()))
    return Profile.of(device, left_bytes, options.settled_layout, head_dim)


def matrix_types(file: ModelFile) -> set[int]:
    """The ggml types of the file's matrices."""
    return {one.type.id for one in file.tensors.values() if len(one.shape) > 1}
