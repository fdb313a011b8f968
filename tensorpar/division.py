"""How a model's blocks are divided over ranks: by weight, and by the room that each rank has. Pure arithmetic.

Ranks meet after every block, so each block is divided by itself, and who is quick in one cannot make up for another.
Memory is one for all blocks: who has no room for its part of all has less of some. Knows no devices
(tensorpar/planner.py). Source: TPI-LLM, arXiv 2410.00531, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

from edgert.errors import ClusterError
from tensorpar.shares import ROWS_UNIT, Cut, Range, Shard

# What a rank that has no room for its part has less of.
Yields = Literal["rows", "ffn", "heads"]


def divide(n_units: int, weights: Sequence[float], most: Sequence[float] = ()) -> list[int]:
    """Share out units by weight, at least one each: the largest remainders get what is left, of equal ones those of who
    has most room. Nobody gets more than its `most`, as far as others have room."""
    n_ranks = len(weights)
    if not 0 < n_ranks <= n_units:
        raise AssertionError(f"{n_units} units for {n_ranks} ranks")
    limits = [max(1, int(min(n_units, one))) for one in most] or [n_units] * n_ranks
    lacking = max(0, n_units - sum(limits))
    limits = [one + -(-lacking // n_ranks) for one in limits]
    wanted = _within(n_units, weights, limits)
    counts = [max(1, int(one)) for one in wanted]
    while (surplus := n_units - sum(counts)) != 0:
        step = 1 if surplus > 0 else -1
        candidates = [rank for rank, count in enumerate(counts) if (count < limits[rank] if step > 0 else count > 1)]
        rank = max(candidates, key=lambda rank: (step * (wanted[rank] - counts[rank]), step * limits[rank], -rank))
        counts[rank] += step
    return counts


def _within(n_units: int, weights: Sequence[float], limits: Sequence[int]) -> list[float]:
    """Parts by weight, none beyond its limit."""
    parts, free = [float(one) for one in limits], [*range(len(weights))]
    while free:
        total = math.fsum(weights[rank] for rank in free)
        left = n_units - math.fsum(part for rank, part in enumerate(parts) if rank not in free)
        fair = {rank: left * weights[rank] / total if total > 0 else left / len(free) for rank in free}
        full = [rank for rank in free if fair[rank] > limits[rank]]
        if not full:
            return [fair.get(rank, part) for rank, part in enumerate(parts)]
        free = [rank for rank in free if rank not in full]
    return parts


def shard(cut: Cut, weights: Sequence[float], rooms: Sequence[float] = (), *, splits_head: bool = False,
          yields: Yields = "rows") -> tuple[Shard, ...]:
    """A shard for each rank by weight; rank 0 leads. With `splits_head`, each has rows of the output head; else the
    leader has all. Who has not as many bytes in `rooms` as its part of weights and cache takes has less of what
    `yields`, and then less of what comes before it: of the head's rows, the FFN, the attention's heads.

    Raises ClusterError when there are more ranks than the model has parts.
    """
    n_ranks, n_ffn = len(weights), cut.ffn_size // cut.ffn_unit
    if n_ranks > cut.max_ranks:
        raise ClusterError(f"this model divides over at most {cut.max_ranks} devices, not {n_ranks}",
                           f"Use {cut.max_ranks} of them: --devices {cut.max_ranks}.")
    if n_ranks == 1:
        return (cut.whole(),)
    left = [*rooms] or [math.inf] * n_ranks
    if not splits_head:
        left[0] -= cut.head_bytes
    head, ffn = cut.head_bytes if splits_head else 0, cut.stored_ffn_bytes / n_ffn
    parts = [one / math.fsum(weights) if any(weights) else 1 / n_ranks for one in weights]
    for_ffn = [max(ffn, cut.stored_ffn_bytes * part) if yields == "heads" else ffn for part in parts]
    for_head = [0.0 if yields == "rows" else head * part for part in parts]

    heads = _head_ranges(cut, weights, [one - a - b for one, a, b in zip(left, for_ffn, for_head, strict=True)])
    left = [one - cut.bytes_per_head * (end - start) for one, (start, end) in zip(left, heads, strict=True)]
    counts = divide(n_ffn, weights, [(one - b) / ffn for one, b in zip(left, for_head, strict=True)])
    left = [one - ffn * count for one, count in zip(left, counts, strict=True)]
    head_rows = _head_rows(cut, weights, left) if splits_head else [
        ((0, cut.n_head_rows),), *((),) * (n_ranks - 1)]

    ends = [cut.ffn_unit * end for end in accumulate(counts)]
    per_kv = cut.n_heads // cut.n_kv_heads
    columns = [((end - cut.ffn_unit * count, end),) for end, count in zip(ends, counts, strict=True)]
    return tuple(Shard((one,), ((one[0] // per_kv, -(-one[1] // per_kv)),), own, rows, leads=rank == 0)
                 for rank, (one, own, rows) in enumerate(zip(heads, columns, head_rows, strict=True)))


def _head_rows(cut: Cut, weights: Sequence[float], rooms: Sequence[float]) -> list[tuple[Range, ...]]:
    unit_bytes = cut.head_bytes / cut.n_head_rows * ROWS_UNIT
    ends = [ROWS_UNIT * end for end in accumulate(divide(cut.max_head_ranks, weights,
                                                          [one / unit_bytes for one in rooms]))]
    return [((start, end),) for start, end in pairwise([0, *ends[:-1], cut.n_head_rows])]


def _head_ranges(cut: Cut, weights: Sequence[float], rooms: Sequence[float]) -> list[Range]:
    n_groups = cut.n_heads // cut.group_unit
    if len(weights) <= n_groups:
        unit_bytes = cut.bytes_per_head * cut.group_unit
        ends = [cut.group_unit * end for end in accumulate(divide(n_groups, weights,
                                                                  [one / unit_bytes for one in rooms]))]
        return list(zip([0, *ends[:-1]], ends, strict=True))
    # More ranks than groups: each group is shared by some ranks in a row, within it by weight, whatever their room.
    ranges: list[Range] = []
    ranks = iter(weights)
    for group, n_ranks in enumerate(divide(len(weights), [1.0] * n_groups)):
        own = [next(ranks) for _ in range(n_ranks)]
        unit = cut.head_unit if n_ranks > 1 else cut.group_unit
        start = group * cut.group_unit
        for count in divide(cut.group_unit // unit, own):
            ranges.append((start, start + count * unit))
            start += count * unit
    return ranges
