"""How fast this device is: its disk, its memory, and its kernels by quantisation type and batch size.

Pure values and look-ups. Measuring is edgert/engine/calibration.py and offload/disk_speed.py; keeping what was
measured is edgert/memory/profile_store.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

# Experts are multiplied with by other kernels than whole matrices are, in the layout of the file.
Layout = Literal["plain", "repack", "experts"]
Key = TypeVar("Key")
Part = Literal["disk", "compute"]
HitCurve = Sequence[tuple[float, float]]
Limit = Literal["disk", "memory bandwidth", "compute"]
# Seconds that 1 byte of a matrix takes for so many tokens, before anything was measured: a core of 2020 with AVX2.
_NOMINAL_S_PER_BYTE = {1: 1.2e-10, 8: 4e-10, 256: 8e-9}
# What was measured while other programs computed is measured again at the next starts, so often at the most: a device
# that is never idle is as slow as it is.
_MOST_TRIES = 3
# One answer's surprise is never believed whole, and never beyond a factor: a busy minute must not spoil the profile.
_CORRECTION_SHARE, _MAX_CORRECTION, _MAX_NOMINAL_CORRECTION = 0.3, 4.0, 100.0


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Direct reads of large pieces into huge pages, and how long the smallest read takes."""

    bytes_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What one model's pass of one token costs here, measured by its own graphs over other memory
    (offload/rehearsal.py). Seconds."""

    fused_s: float  # in one graph, an empty cache, plain layout
    blocks_s: float  # block by block, every expert in memory
    attend_s: Mapping[int, float]  # what so many cached tokens add, from 0 on
    misses_s: Mapping[int, float] = field(default_factory=dict)
    """What so many experts that have to be read add to the pass, by the disk of the file: from 0 to all, never less for
    more."""
    n_disturbed: int = 0  # rehearsals in a row during which other programs computed, this one the best

    @property
    def is_doubtful(self) -> bool:
        """Whether it is to be rehearsed again."""
        return 0 < self.n_disturbed < _MOST_TRIES

    def disturbed(self, before: Rehearsal | None) -> Rehearsal:
        """Of this one, during which others computed, and the one before: the quicker, which was disturbed less."""
        n = 1 + (before.n_disturbed if before else 0)
        best = min((self, before or self), key=lambda one: one.fused_s + one.blocks_s)
        return replace(best, n_disturbed=n)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One device with one number of threads. What was not measured has nominal figures."""

    multiply_s: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """`type/layout` (12/plain) -> tokens at once, of each expert -> seconds for each byte of the matrix."""
    attend_s: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    """Size of a head -> tokens at once -> seconds for each multiplication with a cached value."""
    memory_bytes_s: float = 1e10
    disk: DiskSpeed = DiskSpeed(1e9, 2e-4)
    n_threads: int = 1
    corrections: Mapping[str, float] = field(default_factory=dict)
    """Measured time over predicted time of reading and of computing, learnt from answers."""
    rehearsals: Mapping[str, Rehearsal] = field(default_factory=dict)
    """By the model's key. A model that is not among them is predicted by its parts."""
    curves: Mapping[str, HitCurve] = field(default_factory=dict)
    """By the model's key: share of the experts in memory, share of the uses that find theirs; learnt from answers."""

    n_disturbed: int = 0
    """Measurements of the kernels in a row during which other programs computed: what is here is the best of them."""

    @property
    def is_doubtful(self) -> bool:
        """Whether kernels and disk are to be measured again."""
        return 0 < self.n_disturbed < _MOST_TRIES

    def disturbed(self, before: DeviceProfile | None) -> DeviceProfile:
        """Of this one, during which others computed, and the one before: the best of all figures, for others only make
        slower."""
        if before is None:
            return replace(self, n_disturbed=1)
        return replace(self, multiply_s=_best(self.multiply_s, before.multiply_s),
                       attend_s=_best(self.attend_s, before.attend_s), n_disturbed=before.n_disturbed + 1,
                       memory_bytes_s=max(self.memory_bytes_s, before.memory_bytes_s),
                       disk=max(self.disk, before.disk, key=lambda one: one.bytes_s))

    def multiply(self, type_id: int, layout: Layout, n_bytes: float, n_tokens: float) -> float:
        """Seconds to multiply `n_bytes` of matrices by `n_tokens` at once: between two measured batch sizes, linear;
        beyond the largest, in batches of it."""
        table = self.multiply_s.get(f"{type_id}/{layout}") or self.multiply_s.get(f"{type_id}/plain") \
            or _NOMINAL_S_PER_BYTE
        return n_bytes * _interpolated(table, n_tokens)

    def attend(self, head_dim: int, n_products: float, n_tokens: int) -> float:
        """Seconds for `n_products` multiplications of queries with cached keys, and as many with values."""
        if not self.attend_s:
            return n_products * 1.5e-10
        nearest = min(self.attend_s, key=lambda size: abs(size - head_dim))
        sizes = self.attend_s[nearest]
        return n_products * sizes[min(sizes, key=lambda n: abs(n - min(n_tokens, max(sizes))))]

    def corrected(self, part: Part) -> float:
        """Factor for the predicted time of reading (`disk`) or of computing."""
        return self.corrections.get(part, 1.0)

    @property
    def is_measured(self) -> bool:
        """Whether the device was calibrated; else all but corrections is nominal."""
        return bool(self.multiply_s)

    def learn(self, part: Part, measured_over_predicted: float) -> DeviceProfile:
        """The profile after an answer, limited by `part`, that took so many times what was predicted. Of nominal
        figures, the first answer corrects all."""
        is_first = not self.is_measured and part not in self.corrections
        share, most = (1.0, _MAX_NOMINAL_CORRECTION) if is_first else \
            (_CORRECTION_SHARE, _MAX_CORRECTION if self.is_measured else _MAX_NOMINAL_CORRECTION)
        after = self.corrected(part) * max(measured_over_predicted, 1e-3) ** share
        bounded = min(most, max(1 / most, after))
        return replace(self, corrections={**self.corrections, part: bounded})


def _best(*tables: Mapping[Key, Mapping[int, float]]) -> dict[Key, dict[int, float]]:
    """The least of each entry."""
    found: dict[Key, dict[int, float]] = {}
    for table in tables:
        for key, sizes in table.items():
            best = found.setdefault(key, {})
            best.update({n: min(seconds, best.get(n, seconds)) for n, seconds in sizes.items()})
    return found


def _interpolated(table: Mapping[int, float], n: float) -> float:
    sizes = sorted(table)
    if n <= sizes[0]:
        return table[sizes[0]]
    if n >= sizes[-1]:
        return table[sizes[-1]] * n / sizes[-1]
    above = bisect_left(sizes, n)
    low, high = sizes[above - 1], sizes[above]
    return table[low] + (table[high] - table[low]) * (n - low) / (high - low)
