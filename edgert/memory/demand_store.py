"""Keeps what plans were made for, by model file: so that a plan for another budget needs no ggml and no header.

One JSON file for all models. What is damaged, or of a file that has changed since, counts as not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from edgert.cache_file import read_cache, write_cache
from edgert.memory.planner import Demand
from edgert.memory.shape import ModelShape, Overheads, Phase

_MAX_MODELS = 128  # some 2 KiB each
_MAX_NUMBER = 2**62
_MAX_KEY_LENGTH = 256
_CHOSEN_ANEW = "kv"  # tiers of keys and values: they depend on the budget
_TABLES = frozenset({"matrix_bytes", "head_bytes", "expert_bytes", "repackable_bytes", "compute_bytes"})


class DemandStore:
    """The last demand of each model file, and the keys of the device and the disk that it was on."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, model: Path, demand: Demand, device: str, disk: str) -> None:
        """Remember it; without what answers have taught, which is kept with the device."""
        version = _version(model)
        if version is None:
            return
        known = {name: entry for name, entry in read_cache(self._path).items() if name != str(model)}
        shape = {name: value for name, value in asdict(demand.shape).items() if name != _CHOSEN_ANEW}
        entry = {"version": version, "device": device, "disk": disk, "shape": shape,
                 "overheads": asdict(demand.overheads), "context_length": demand.context_length,
                 "batch_size": demand.batch_size,
                 "repacked": {phase: sorted(types) for phase, types in demand.repacked.items()}}
        write_cache(self._path, dict([*known.items(), (str(model), entry)][-_MAX_MODELS:]))

    def load(self, model: Path) -> tuple[Demand, str, str] | None:
        """Demand, device and disk of this file as it is now; None where they are not known."""
        entry = read_cache(self._path).get(str(model))
        if not isinstance(entry, dict) or entry.get("version") != _version(model):
            return None
        shape = _values(ModelShape, entry.get("shape"))
        overheads = _values(Overheads, entry.get("overheads"))
        sizes = [entry.get(name) for name in ("context_length", "batch_size")]
        names, repacked = [entry.get(name) for name in ("device", "disk")], _repacked(entry.get("repacked"))
        if shape is None or overheads is None or repacked is None or not all(map(_is_size, sizes)) \
                or not all(isinstance(name, str) for name in names) or not overheads["compute_bytes"]:
            return None
        demand = Demand(ModelShape(**shape), Overheads(**overheads), sizes[0], sizes[1], repacked)  # type: ignore[arg-type]
        return demand, str(names[0]), str(names[1])


def _version(model: Path) -> list[int] | None:
    """[bytes, time of the last write in nanoseconds]; None without a file."""
    try:
        stat = model.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _values(kind: type, raw: object) -> dict[str, Any] | None:
    """Arguments of the dataclass: sizes, tables of sizes by number, one flag and one key. None for anything else."""
    names = {one.name for one in fields(kind)} - {_CHOSEN_ANEW}
    if not isinstance(raw, dict) or raw.keys() != names:
        return None
    found: dict[str, Any] = {}
    for name, value in raw.items():
        found[name] = _table(value) if name in _TABLES else value
        is_sound = {"foresees": isinstance(value, bool),
                    "key": isinstance(value, str) and len(value) <= _MAX_KEY_LENGTH}
        if found[name] is None or not is_sound.get(name, name in _TABLES or _is_size(value)):
            return None
    return found


def _table(raw: object) -> dict[int, int] | None:
    if not isinstance(raw, dict) or not all(key.isdecimal() and _is_size(value) for key, value in raw.items()):
        return None
    return {int(key): value for key, value in raw.items()}


def _repacked(raw: object) -> Mapping[Phase, frozenset[int]] | None:
    if not isinstance(raw, dict) or not raw.keys() <= {*get_args(Phase)}:
        return None
    if not all(isinstance(types, list) and all(map(_is_size, types)) for types in raw.values()):
        return None
    return {phase: frozenset(types) for phase, types in raw.items()}


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER
