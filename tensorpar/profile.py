"""What a device tells others of itself: how long it takes over a byte of weights, its disk, and the memory it gives.

A part of the memory manager's profile (edgert/memory/profile.py), which is where it is measured and kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgert.memory.profile import DeviceProfile
from edgert.memory.profile import Layout as OneLayout

Layout = OneLayout | Literal["auto"]
# What most files consist of: Q4_0, Q8_0, Q4_K, Q5_K, Q6_K. Of other types a worker says what it takes for Q4_K.
COMMON_TYPES = (2, 8, 12, 13, 14)
_MAX_TYPES, _MAX_TYPE_ID = 64, 256
_MAX_BYTES = 2**60
_LEAST_S, _MOST_S = 1e-16, 1.0


@dataclass(frozen=True, slots=True)
class Profile:
    """One device's figures, all for one token at a time, with all its threads."""

    byte_s: Mapping[int, float]
    """By ggml type: seconds to multiply a byte of a matrix, in the layout that this device uses."""
    attend_s: float  # for each product of a query's or a weight's value with a cached one
    disk_bytes_s: float
    memory_bytes: int  # what it has left for its part of a model
    n_threads: int

    @classmethod
    def of(cls, device: DeviceProfile, memory_bytes: int, layout: Layout = "auto", head_dim: int = 128) -> Profile:
        """What the memory manager knows of a device, corrected by what answers have taught."""
        learnt = device.corrected("compute")
        layouts: tuple[OneLayout, ...] = ("plain", "repack") if layout == "auto" else (layout,)
        types = {int(key.split("/")[0]) for key in device.multiply_s}
        byte_s = {one: min(device.multiply(one, each, learnt, 1) for each in layouts) for one in types}
        return cls(byte_s or {COMMON_TYPES[2]: device.multiply(COMMON_TYPES[2], "plain", learnt, 1)},
                   device.attend(head_dim, learnt, 1), device.disk.bytes_s / device.corrected("disk"), memory_bytes,
                   device.n_threads)

    def multiply(self, type_id: int, n_bytes: float) -> float:
        """Seconds to multiply a token by so many bytes of matrices."""
        found = self.byte_s.get(type_id) or self.byte_s.get(COMMON_TYPES[2]) or max(self.byte_s.values())
        return n_bytes * found

    @property
    def bytes_per_s(self) -> float:
        """Of the type that most files consist of: one figure for people."""
        return 1 / self.multiply(COMMON_TYPES[2], 1.0)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "byte_s": {str(key): value for key, value in self.byte_s.items()},
                "bytes_per_s": self.bytes_per_s}

    @classmethod
    def of_message(cls, raw: object) -> Profile:
        """What a peer says about itself. Raises ValueError where it is impossible."""
        if not isinstance(raw, dict):
            raise ValueError("no profile")
        table, memory, threads = (raw.get(key) for key in ("byte_s", "memory_bytes", "n_threads"))
        if not (isinstance(table, dict) and 0 < len(table) <= _MAX_TYPES and type(memory) is int
                and 0 <= memory < _MAX_BYTES and type(threads) is int and 0 < threads < 4096):
            raise ValueError("an impossible profile")
        byte_s = {int(key): _number(value, _LEAST_S, _MOST_S) for key, value in table.items()
                  if isinstance(key, str) and key.isascii() and key.isdecimal() and int(key) < _MAX_TYPE_ID}
        if not byte_s:
            raise ValueError("an impossible profile")
        return cls(byte_s, _number(raw.get("attend_s"), _LEAST_S, _MOST_S),
                   _number(raw.get("disk_bytes_s"), 1.0, _MAX_BYTES), memory, threads)


def _number(value: object, least: float, most: float) -> float:
    if not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError("an impossible profile")
    return float(value)
