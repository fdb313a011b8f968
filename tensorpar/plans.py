"""Plans of earlier starts: the same devices get the same parts again, so that no weight travels twice.

Speeds are measured at each start and vary by some percent; a plan that is nearly as fast as a new one is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from edgert.cache_file import read_cache, write_cache
from edgert.paths import Paths
from tensorpar.planner import Prediction
from tensorpar.shares import Cut, Range, Shard, covers

# A kept plan may be this much slower than a new one would be: sending weights anew takes longer than it gains.
_WORTH_KEEPING = 0.85
_MAX_PLANS = 64


class Plans:
    """What was decided for a model and some devices, in a file of the cache. A damaged one counts as none."""

    def __init__(self, paths: Paths) -> None:
        self._path = paths.cache / "cluster-plans.json"

    @staticmethod
    def key(model_fingerprint: str, device_fingerprints: Sequence[str]) -> str:
        return hashlib.sha256("/".join((model_fingerprint, *device_fingerprints)).encode()).hexdigest()

    def get(self, key: str, cut: Cut, n_ranks: int) -> tuple[Shard, ...] | None:
        """The shards of an earlier start, leader first, if they still divide this model."""
        try:
            shards = tuple(_shard(one, rank == 0) for rank, one in enumerate(read_cache(self._path)[key]))
        except (KeyError, TypeError, ValueError):
            return None
        return shards if len(shards) == n_ranks and covers(cut, shards) else None

    def put(self, key: str, shards: Sequence[Shard]) -> None:
        plans = read_cache(self._path)
        plans.pop(key, None)
        plans[key] = [asdict(one) for one in shards]
        kept = dict(list(plans.items())[-_MAX_PLANS:])
        write_cache(self._path, kept)  # lost, it costs weights that travel again, no more


def is_worth_keeping(before: Prediction, anew: Prediction) -> bool:
    """Whether the earlier parts do as well as new ones. Not where they would stream now, and new ones not at all."""
    streams_now = before.missing_bytes > 0 and anew.missing_bytes == 0
    return before.tokens_per_s >= _WORTH_KEEPING * anew.tokens_per_s and not streams_now


def _shard(raw: dict[str, Any], leads: bool) -> Shard:
    return Shard(_ranges(raw["heads"]), _ranges(raw["kv_heads"]), _ranges(raw["ffn"]), _ranges(raw["head_rows"]), leads)


def _ranges(raw: Sequence[Sequence[int]]) -> tuple[Range, ...]:
    ranges = tuple((int(start), int(end)) for start, end in raw)
    if any(start >= end or start < 0 for start, end in ranges):
        raise ValueError("an empty range")
    return ranges
