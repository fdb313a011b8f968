"""What a model would do here within a budget: fit, stream, or be too slow; and about how fast.

The one seam to whoever predicts speeds. Of a model that was opened or planned here, `planned` tells what the memory
manager's planner says. Of others `forecast` goes by bytes, since every token reads every active weight once, from
memory where it stays and from disk where it does not; figures of the device come in as `Speeds`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgert.errors import BudgetTooSmall
from edgert.memory.demand_store import DemandStore
from edgert.memory.model import kv_bytes as bytes_of_kv
from edgert.memory.model import memory_bytes
from edgert.memory.planner import Demand, make_plan, read_bytes, tok_s
from edgert.memory.profile import DeviceProfile
from edgert.memory.profile_store import ProfileStore
from edgert.memory.sizes import Sizes
from edgert.models.describe import Description
from edgert.paths import Paths

Verdict = Literal["fits", "streams", "too slow"]
# Before anything was measured here: a small board's memory, and a cheap SSD read past the page cache.
_MEMORY_BYTES_S, _DISK_BYTES_S = 8e9, 1e9
# Slower than this, nobody reads along.
TOO_SLOW_TOK_S = 0.5
# Beside weights and KV: the interpreter, libraries, vocabulary and compute buffers.
_PROCESS_BYTES = 192 * 2**20
_WINDOW_SHARE = 0.05  # of the weights: what streams passes through a window of about this size


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes per second from memory, as computing sees it, and from disk; `measured` where an answer has shown it."""

    memory_bytes_s: float = _MEMORY_BYTES_S
    disk_bytes_s: float = _DISK_BYTES_S
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """What a forecast needs to know of a model. `active_bytes` of the weights are read for every token."""

    file_bytes: int
    active_bytes: int
    kv_bytes_per_token: int
    context_length: int | None

    @classmethod
    def of(cls, model: Description) -> Shape:
        active = model.file_bytes
        if model.n_experts and model.n_experts_used:
            idle = 1 - min(1.0, model.n_experts_used / model.n_experts)
            active -= int(model.block_bytes["experts"] * idle)
        return cls(model.file_bytes, max(1, active), (model.kv_bytes_per_token or {}).get("f16", 0),
                   model.context_length)


@dataclass(frozen=True, slots=True)
class Forecast:
    """A model within a budget. Bytes in memory by kind; `streamed_bytes` are read from disk for every token."""

    verdict: Verdict
    tokens_per_s: float
    measured: bool
    budget_bytes: int
    pinned_bytes: int
    kv_bytes: int
    other_bytes: int
    streamed_bytes: int
    needed_bytes: int  # to keep everything in memory

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_s": round(self.tokens_per_s, 2)}


def forecast(model: Shape, budget_bytes: int, context_length: int, speeds: Speeds) -> Forecast:
    """The model within `budget_bytes` for the whole process."""
    kv_bytes = model.kv_bytes_per_token * min(context_length, model.context_length or context_length)
    needed_bytes = model.file_bytes + kv_bytes + _PROCESS_BYTES
    room_bytes, window_bytes = budget_bytes - kv_bytes - _PROCESS_BYTES, int(_WINDOW_SHARE * model.file_bytes)
    pinned_bytes = model.file_bytes if needed_bytes <= budget_bytes else max(0, room_bytes - window_bytes)
    streamed_bytes = int((model.file_bytes - pinned_bytes) * model.active_bytes / model.file_bytes)
    # Reading goes on beside computing: the slower of the two counts.
    seconds = max(model.active_bytes / speeds.memory_bytes_s, streamed_bytes / speeds.disk_bytes_s, 1e-6)
    verdict: Verdict = "streams" if streamed_bytes else "fits"
    if seconds * TOO_SLOW_TOK_S > 1 or (streamed_bytes and room_bytes < window_bytes):
        verdict = "too slow"
    return Forecast(verdict, 1 / seconds, speeds.measured, budget_bytes, pinned_bytes, kv_bytes, _PROCESS_BYTES,
                    streamed_bytes, needed_bytes)


def planned(paths: Paths, model: Path, budget_bytes: int, context_length: int) -> Forecast | None:
    """The plan for a model file, from what its last opening and this device's measurements have left in the cache. None
    where either has left nothing."""
    found = DemandStore(paths.cache / "demands.json").load(model)
    if found is None:
        return None
    demand, device, disk = found
    profile, _ = ProfileStore(paths.cache / "device.json").load(device, disk)
    if profile is None:
        return None
    demand = replace(demand, context_length=min(context_length, demand.shape.context_length or context_length),
                     curve=profile.curves.get(demand.shape.key, demand.curve))
    return _of_plan(demand, profile, budget_bytes)


def _of_plan(demand: Demand, profile: DeviceProfile, budget_bytes: int) -> Forecast:
    shape, is_measured = demand.shape, profile.is_measured or bool(profile.corrections)
    needed_bytes = memory_bytes(shape, demand.overheads, Sizes("resident"), demand.context_length)
    try:
        plan = make_plan(demand, profile, budget_bytes)
    except BudgetTooSmall:
        return Forecast("too slow", 0.0, is_measured, budget_bytes, 0, bytes_of_kv(shape, demand.context_length),
                        0, shape.file_bytes, needed_bytes)
    tokens_per_s, read = tok_s(demand, profile, plan), int(read_bytes(demand, plan.sizes))
    verdict: Verdict = "too slow" if tokens_per_s < TOO_SLOW_TOK_S else "streams" if read else "fits"
    pinned_bytes = shape.file_bytes if plan.sizes.weights == "resident" else \
        plan.sizes.pinned_bytes + plan.sizes.pool_slots * shape.slot_bytes
    return Forecast(verdict, tokens_per_s, is_measured, budget_bytes, pinned_bytes, plan.kv_bytes,
                    max(0, plan.peak_bytes - pinned_bytes - plan.kv_bytes), read, needed_bytes)


def learned(speeds: Speeds, model: Shape, tokens_per_s: float, streamed_bytes: int) -> Speeds:
    """Speeds after an answer at `tokens_per_s`, which read `streamed_bytes` of every token from disk."""
    if streamed_bytes:
        return replace(speeds, disk_bytes_s=streamed_bytes * tokens_per_s, measured=True)
    return replace(speeds, memory_bytes_s=model.active_bytes * tokens_per_s, measured=True)
