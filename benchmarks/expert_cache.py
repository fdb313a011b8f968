"""Replays a routing trace through the runtime's expert cache, beside LRU and Belady's optimum.

    python benchmarks/expert_cache.py TRACE.csv --residency 4,12.5,25,50 --json

The trace names the experts that a model chose, step by step (columns turn, phase, step, layer, expert; phase 0 is
prefill, 1 decode). Each policy has one pool for all layers, of so many percent of all experts; prefill steps warm it,
hits are counted over the decode steps. One line per residency: `residency_pct`, and the hit rates (0..1) `hit` (ours),
`lru` and `belady`.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import groupby
from pathlib import Path

from offload.eviction import ExpertSlots, Key

_COLUMNS = ("turn", "phase", "step", "layer", "expert")
_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Visit:
    """One layer of one step: the experts that were chosen, best first. `step` counts on over turns."""

    step: int
    layer: int
    counts: bool
    experts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    n_layers: int
    n_experts: int
    visits: tuple[Visit, ...]

    def uses(self) -> Iterable[tuple[Key, bool]]:
        """Every use of an expert in order, and whether it counts."""
        return (((v.layer, expert), v.counts) for v in self.visits for expert in v.experts)


def read_trace(path: Path) -> Trace:
    """The trace in the order of its steps. Sizes come from the header, or from what the rows name."""
    with path.open(newline="") as file:
        lines = list(file)
    header = " ".join(line for line in lines if line.startswith("#"))
    rows = [tuple(int(row[name]) for name in _COLUMNS)
            for row in csv.DictReader(line for line in lines if line.strip() and not line.startswith("#"))]
    if not rows:
        raise SystemExit(f"{path}: the trace has no rows")
    visits, step, previous = [], -1, None
    # Files list a prefill layer by layer; sorting is stable, so experts stay best first.
    for (turn, phase, number, layer), group in groupby(sorted(rows, key=lambda r: r[:4]), key=lambda r: r[:4]):
        step, previous = step + ((turn, phase, number) != previous), (turn, phase, number)
        visits.append(Visit(step, layer, phase == 1, tuple(dict.fromkeys(row[4] for row in group))))
    return Trace(_size(header, "n_layer", max(v.layer for v in visits) + 1),
                 _size(header, "n_expert", max(max(v.experts) for v in visits) + 1), tuple(visits))


def _size(header: str, name: str, seen: int) -> int:
    found = re.search(rf"\b{name}=(\d+)", header)
    return max(seen, int(found[1]) if found else 0)


def hit_rate(trace: Trace, n_slots: int) -> float:
    """Of the runtime's policy: a layer's experts are held together, then released."""
    slots, n_hits, n_uses = ExpertSlots(n_slots, trace.n_layers), 0, 0
    for visit in trace.visits:
        keys = [(visit.layer, expert) for expert in visit.experts]
        held = [key for key in keys if slots.hold(key) is not None]
        missing = [key for key in keys if key not in slots]
        held += [key for key in missing if slots.claim(key, visit.step)]
        for key in held:
            slots.release(key, visit.step)
        if visit.counts:
            n_hits, n_uses = n_hits + len(keys) - len(missing), n_uses + len(keys)
    return n_hits / max(1, n_uses)


def lru_hit_rate(trace: Trace, n_slots: int) -> float:
    cache: OrderedDict[Key, None] = OrderedDict()
    n_hits = n_uses = 0
    for key, counts in trace.uses():
        n_hits, n_uses = n_hits + (counts and key in cache), n_uses + counts
        cache[key] = None
        cache.move_to_end(key)
        if len(cache) > n_slots:
            cache.popitem(last=False)
    return n_hits / max(1, n_uses)


def belady_hit_rate(trace: Trace, n_slots: int) -> float:
    """Evicts what is used again last: no policy hits more often."""
    uses = list(trace.uses())
    following, next_use = dict[Key, int](), [_NEVER] * len(uses)
    for index in range(len(uses) - 1, -1, -1):
        next_use[index] = following.get(uses[index][0], _NEVER)
        following[uses[index][0]] = index
    cache, farthest = dict[Key, int](), list[tuple[int, Key]]()
    n_hits = n_uses = 0
    for index, (key, counts) in enumerate(uses):
        n_hits, n_uses = n_hits + (counts and key in cache), n_uses + counts
        if key not in cache and len(cache) >= n_slots:
            while True:
                when, victim = heappop(farthest)
                if cache.get(victim) == -when:
                    break
            del cache[victim]
        cache[key] = next_use[index]
        heappush(farthest, (-next_use[index], key))
    return n_hits / max(1, n_uses)


def replay(trace: Trace, residency_pct: float) -> dict[str, float]:
    n_slots = max(1, int(trace.n_layers * trace.n_experts * residency_pct / 100))
    return {"residency_pct": residency_pct, "hit": hit_rate(trace, n_slots), "lru": lru_hit_rate(trace, n_slots),
            "belady": belady_hit_rate(trace, n_slots)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--residency", default="4,12.5,25,50", help="percent of all experts, separated by commas")
    parser.add_argument("--json", action="store_true", help="a JSON line per residency instead of a table")
    args = parser.parse_args()
    trace = read_trace(args.trace)
    if not args.json:
        print("residency    ours     LRU  Belady  ours/Belady")
    for text in args.residency.split(","):
        result = replay(trace, float(text))
        if args.json:
            print(json.dumps(result), flush=True)
        else:
            print(f"{result['residency_pct']:7.1f} %  {result['hit']:.4f}  {result['lru']:.4f}  {result['belady']:.4f}"
                  f"  {result['hit'] / (result['belady'] or 1):11.3f}", flush=True)


if __name__ == "__main__":
    main()
