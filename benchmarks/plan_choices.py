"""Whether the chosen plan is a good one: beside a dozen others of the same budget, in turn. Needs root.

    python benchmarks/plan_choices.py QWEN-0.5B.gguf QWEN-1.5B.gguf ST4B.gguf --ratio 2 --json choices.json    4 minutes

The others have windows from the least that works to three times what is comfortable, smaller compute buffers, more in
the window and less pinned; with experts, pools from a layer's to what memory holds. Each round gives a short answer
with every plan, in another order; then the chosen plan and the best of the others meet in rounds of their own. A
plan's figure is the median over rounds of its speed over the chosen one's in that round: a machine that grows slower
moves both, and the best of a dozen draws is no better than it proves to be when it is drawn again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import plan_cases
from plan_cases import Case

from apps.bench.control_group import is_possible

_CONTEXT = 1024
# Windows beyond the least that works, in what is comfortable; the share of the rest that is pinned, or of the slots
# that experts could have.
_WINDOWS, _SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0), (0.95, 0.85, 0.7, 0.5)
_POOLS, _DENSE = (0.3, 0.5, 0.7, 0.85, 0.95), (0.75, 0.5, 0.25)
_ROUNDS, _FINALISTS, _FINAL_ROUNDS = 2, 3, 4
_MOST_OTHERS = 14
Plan = dict[str, Any]


def others(room: Mapping[str, Any]) -> list[tuple[str, Plan]]:
    """Named plans that the budget has room for, without the chosen one."""
    chosen: Plan = room["chosen"]
    found = _pools(room) if room["slot_bytes"] else _windows(room)
    distinct = {json.dumps(plan): (name, plan) for name, plan in found if plan != chosen}
    return [*distinct.values()][:_MOST_OTHERS]


def _windows(room: Mapping[str, Any]) -> list[tuple[str, Plan]]:
    """All that the window leaves is pinned, or a share of it: then the window takes the rest."""
    chosen, small, most = room["chosen"], room["small_bytes"], room["small_bytes"] + room["large_bytes"]
    found = []
    for n_blocks in _WINDOWS:
        window = room["least_window_bytes"] + int(n_blocks * room["comfortable_bytes"])
        if small + window <= room["free_bytes"]:
            pinned = min(most, room["free_bytes"] - window)
            found.append((f"window {n_blocks:g}", {**chosen, "pinned_bytes": pinned, "window_bytes": window}))
    for share in _SHARES:
        pinned = small + int((chosen["pinned_bytes"] - small) * share)
        for window, what in ((room["free_bytes"] - pinned, "the rest window"),
                             (chosen["window_bytes"], "the rest free")):
            found.append((f"pinned {share:.0%}, {what}", {**chosen, "pinned_bytes": pinned, "window_bytes": window}))
    return found


def _pools(room: Mapping[str, Any]) -> list[tuple[str, Plan]]:
    """Fewer experts with everything else pinned; and more of them, where the rest streams through a window."""
    chosen, small, large = room["chosen"], room["small_bytes"], room["large_bytes"]
    found = []
    for share in _POOLS:
        slots = max(room["layer_slots"], int(chosen["pool_slots"] * share))
        found.append((f"{share:.0%} of the experts", {**chosen, "pool_slots": slots}))
    for share in _DENSE:
        for n_blocks in (0.0, 0.5, 1.0):
            window = room["least_window_bytes"] + int(n_blocks * room["comfortable_bytes"])
            pinned = small + int(large * share)
            slots = (room["free_bytes"] - window - pinned) // room["slot_bytes"]
            if slots >= room["layer_slots"]:
                found.append((f"{share:.0%} of the rest, window {n_blocks:g}",
                              {**chosen, "pinned_bytes": pinned, "window_bytes": window, "pool_slots": slots}))
    return found


def compare(case: Case, homes: Mapping[int, Path]) -> dict[str, Any] | None:
    """The chosen plan beside the others; None where it does not stream, or does not fit."""
    room = plan_cases.run(case, homes, "choices")
    if room is None or room["chosen"]["weights"] != "streamed":
        return None
    named = {"chosen": room["chosen"], **dict(others(room))}
    all_rounds = [_round(case, homes, named, number) for number in range(_ROUNDS)]
    ratios = _ratios(all_rounds, [*named])
    best = sorted((name for name in named if name != "chosen"), key=lambda name: -ratios[name])[:_FINALISTS]
    finals = [_round(case, homes, {name: named[name] for name in ("chosen", *best)}, _ROUNDS + number)
              for number in range(_FINAL_ROUNDS)]
    in_finals = _ratios(finals, best)
    return {"case": case.name, "plans": named, "over_chosen": {**ratios, **in_finals},
            "chosen_tok_s": statistics.median(one["chosen"] for one in (*all_rounds, *finals)),
            "best_of_others": max(in_finals, key=in_finals.__getitem__),
            "chosen_over_best": 1 / max(in_finals.values())}


def _round(case: Case, homes: Mapping[int, Path], plans: Mapping[str, Plan], number: int) -> dict[str, float]:
    """Tokens/s of every plan, in an order of this round's own."""
    names = random.Random(number).sample([*plans], len(plans))
    found = plan_cases.run(case, homes, "choices", plans=[plans[name] for name in names])
    assert found is not None  # what does not fit has been left out
    return dict(zip(names, found["tok_s"], strict=True))


def _ratios(rounds: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    return {name: statistics.median(one[name] / one["chosen"] for one in rounds) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--ratio", type=float, default=2.0, help="the model's size over the budget")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not is_possible():
        raise SystemExit("this needs root and a writable memory control group")
    results = []
    with tempfile.TemporaryDirectory() as directory:
        homes = {0: Path(directory)}
        for model in args.models:
            case = Case(model, int(model.stat().st_size / args.ratio), _CONTEXT, 1, 0)
            plan_cases.run(replace(case, budget_bytes=2**33), homes, "calibrate")
            found = compare(case, homes)
            if found is None:
                print(f"{case.name}: everything fits, or nothing does")
                continue
            results.append(found)
            for name, ratio in sorted(found["over_chosen"].items(), key=lambda one: -one[1]):
                print(f"    {name:<32} {ratio:6.3f} of the chosen plan's speed")
            print(f"{case.name}: chosen {found['chosen_tok_s']:.2f} tok/s, {found['chosen_over_best']:.1%} of the best "
                  f"of {len(found['plans']) - 1} others: {found['best_of_others']}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
