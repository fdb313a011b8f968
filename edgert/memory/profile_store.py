"""Keeps what was measured of this device, one JSON file for all of it. What is damaged counts as not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from edgert.cache_file import read_cache, write_cache
from edgert.memory.profile import DeviceProfile, DiskSpeed

_MAX_ENTRIES = 256  # of any table; a device has some 40 types and a few disks


class ProfileStore:
    """Profiles by device key (processor, ggml build, threads), and disks by their own key."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, device: str, disk: str) -> tuple[DeviceProfile | None, DiskSpeed | None]:
        """What is known of the device and of the disk, each None where nothing is."""
        known = read_cache(self._path)
        profile, speed = _profile(_table(known, "devices").get(device)), _disk(_table(known, "disks").get(disk))
        corrections = _numbers(_table(known, "corrections").get(f"{device} {disk}"))
        if profile is not None:
            profile = replace(profile, corrections=corrections or {}, disk=speed or profile.disk)
        return profile, speed

    def save(self, device: str, disk: str, profile: DeviceProfile) -> None:
        """Remember the profile with its disk; a read-only home costs a calibration next time, no more."""
        known = read_cache(self._path)
        devices, disks, corrections = (_table(known, name) for name in ("devices", "disks", "corrections"))
        devices[device] = {
            "multiply_s": {key: dict(sizes) for key, sizes in profile.multiply_s.items()},
            "attend_s": {str(size): dict(sizes) for size, sizes in profile.attend_s.items()},
            "op_s": profile.op_s, "block_s": profile.block_s, "memory_bytes_s": profile.memory_bytes_s,
            "n_threads": profile.n_threads}
        disks[disk] = {"bytes_s": profile.disk.bytes_s, "latency_s": profile.disk.latency_s}
        corrections[f"{device} {disk}"] = dict(profile.corrections)
        newest = {"devices": devices, "disks": disks, "corrections": corrections}
        write_cache(self._path, {name: dict([*table.items()][-_MAX_ENTRIES:]) for name, table in newest.items()})


def _table(known: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = known.get(name)
    return table if isinstance(table, dict) else {}


def _profile(raw: object) -> DeviceProfile | None:
    if not isinstance(raw, dict):
        return None
    multiply, attend = _tables(raw.get("multiply_s")), _tables(raw.get("attend_s"))
    scalars = _numbers({key: raw.get(key) for key in ("op_s", "block_s", "memory_bytes_s", "n_threads")})
    if multiply is None or attend is None or scalars is None or not all(key.isdecimal() for key in attend):
        return None
    return DeviceProfile(multiply, {int(size): sizes for size, sizes in attend.items()}, scalars["op_s"],
                         scalars["block_s"], scalars["memory_bytes_s"], n_threads=int(scalars["n_threads"]))


def _disk(raw: object) -> DiskSpeed | None:
    numbers = _numbers(raw)
    if numbers is None or not {"bytes_s", "latency_s"} <= numbers.keys():
        return None
    return DiskSpeed(numbers["bytes_s"], numbers["latency_s"])


def _tables(raw: object) -> dict[str, dict[int, float]] | None:
    """Tables of positive numbers by batch size; None for anything else."""
    if not isinstance(raw, dict) or len(raw) > _MAX_ENTRIES:
        return None
    found: dict[str, dict[int, float]] = {}
    for key, sizes in raw.items():
        numbers = _numbers(sizes)
        if not numbers or not all(size.isdecimal() and int(size) > 0 for size in numbers):
            return None
        found[key] = {int(size): seconds for size, seconds in numbers.items()}
    return found


def _numbers(raw: object) -> dict[str, float] | None:
    """Names with positive finite numbers; None for anything else."""
    if not isinstance(raw, dict) or len(raw) > _MAX_ENTRIES:
        return None
    sound = all(type(value) in (int, float) and isfinite(value) and value > 0 for value in raw.values())
    return {str(key): float(value) for key, value in raw.items()} if sound else None
