"""Keeps what was measured of this device, one JSON file for all of it. What is damaged counts as not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

from edgert.cache_file import read_cache, write_cache
from edgert.memory.profile import DeviceProfile, DiskSpeed, HitCurve, Rehearsal

_MAX_ENTRIES = 256  # of any table; a device has some 40 types and a few disks
_MAX_POINTS = 64
_TINY = 1e-30


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
            rehearsals = _rehearsals(_table(_table(known, "rehearsals"), f"{device} {disk}"))
            profile = replace(profile, corrections=corrections or {}, disk=speed or profile.disk, rehearsals=rehearsals)
        return profile, speed

    def save(self, device: str, disk: str, profile: DeviceProfile) -> None:
        """Remember the profile with its disk; a read-only home costs a calibration next time, no more."""
        known = read_cache(self._path)
        devices, disks, corrections, rehearsals = (_table(known, name) for name in (
            "devices", "disks", "corrections", "rehearsals"))
        devices[device] = {
            "multiply_s": {key: dict(sizes) for key, sizes in profile.multiply_s.items()},
            "attend_s": {str(size): dict(sizes) for size, sizes in profile.attend_s.items()},
            "memory_bytes_s": profile.memory_bytes_s, "n_threads": profile.n_threads,
            "n_disturbed": profile.n_disturbed,
            "curves": _newest({key: [list(point) for point in curve] for key, curve in profile.curves.items()})}
        if profile.disk != DeviceProfile().disk:  # else it was not measured yet
            disks[disk] = {"bytes_s": profile.disk.bytes_s, "latency_s": profile.disk.latency_s}
        corrections[f"{device} {disk}"] = dict(profile.corrections)
        rehearsals[f"{device} {disk}"] = _newest({key: asdict(one) for key, one in profile.rehearsals.items()})
        newest = {"devices": devices, "disks": disks, "corrections": corrections, "rehearsals": rehearsals}
        write_cache(self._path, {name: _newest(table) for name, table in newest.items()})


def _newest(table: Mapping[str, Any]) -> dict[str, Any]:
    return dict([*table.items()][-_MAX_ENTRIES:])


def _table(known: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = known.get(name)
    return table if isinstance(table, dict) else {}


def _profile(raw: object) -> DeviceProfile | None:
    if not isinstance(raw, dict):
        return None
    multiply, attend = _tables(raw.get("multiply_s")), _tables(raw.get("attend_s"))
    scalars = _numbers({key: raw.get(key) for key in ("memory_bytes_s", "n_threads")})
    if multiply is None or attend is None or scalars is None or not all(key.isdecimal() for key in attend):
        return None
    return DeviceProfile(multiply, {int(size): sizes for size, sizes in attend.items()}, scalars["memory_bytes_s"],
                         n_threads=int(scalars["n_threads"]), curves=_curves(_table(raw, "curves")),
                         n_disturbed=_count(raw.get("n_disturbed")))


def _rehearsals(raw: Mapping[str, Any]) -> dict[str, Rehearsal]:
    """Those that are sound: the others are rehearsed again."""
    found = {key: _rehearsal(one) for key, one in [*raw.items()][:_MAX_ENTRIES]}
    return {key: one for key, one in found.items() if one is not None}


def _rehearsal(raw: object) -> Rehearsal | None:
    if not isinstance(raw, dict):
        return None
    passes = _numbers({key: raw.get(key) for key in ("fused_s", "blocks_s")})
    attend, misses = (_numbers(raw.get(key), least=0.0) for key in ("attend_s", "misses_s"))
    if passes is None or attend is None or misses is None or not all(n.isdecimal() for n in (*attend, *misses)):
        return None
    attend_s, misses_s = ({int(n): seconds for n, seconds in table.items()} for table in (attend, misses))
    is_whole = len(attend_s) > 1 and len(misses_s) != 1
    if not is_whole:
        return None
    return Rehearsal(passes["fused_s"], passes["blocks_s"], attend_s, misses_s, _count(raw.get("n_disturbed")))


def _curves(raw: Mapping[str, Any]) -> dict[str, HitCurve]:
    return {key: points for key, curve in [*raw.items()][:_MAX_ENTRIES] if (points := _points(curve)) is not None}


def _points(raw: object) -> HitCurve | None:
    """Points from 0 to 1 whose numbers rise; None for anything else."""
    if not isinstance(raw, list) or not 2 <= len(raw) <= _MAX_POINTS:
        return None
    points = [tuple(point) for point in raw if isinstance(point, list) and len(point) == 2
              and all(type(value) in (int, float) and 0 <= value <= 1 for value in point)]
    rises = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(points))
    return points if len(points) == len(raw) and rises and points[0][0] == 0 and points[-1][0] == 1 else None


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


def _count(raw: object) -> int:
    """How often something was measured while others computed: of figures that do not say, never."""
    return raw if type(raw) is int and raw >= 0 else 0


def _numbers(raw: object, least: float = _TINY) -> dict[str, float] | None:
    """Names with finite numbers above 0, or from `least` on; None for anything else."""
    if not isinstance(raw, dict) or len(raw) > _MAX_ENTRIES:
        return None
    sound = all(type(value) in (int, float) and isfinite(value) and value >= least for value in raw.values())
    return {str(key): float(value) for key, value in raw.items()} if sound else None
