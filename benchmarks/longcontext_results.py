"""What a comparison has found so far: a line in a file for each method on each item, and tables of means over items.

A comparison that was stopped goes on where its file ends. Knows no model and no text.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

Cell = tuple[str, int]
"""A method and its budget; 0 is everything."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One method on one item. Not a number where the item does not ask for it."""

    kl: float
    top1: float
    nll_difference: float
    answer: float
    recall: float
    n_attended: float


@dataclass(frozen=True, slots=True)
class Place:
    """Which item."""

    task: str
    seed: int
    index: int


class Journal:
    """All outcomes, in memory and, where there is a `path`, in a file that is only ever appended to."""

    def __init__(self, path: Path | None, settings: Mapping[str, object]) -> None:
        self._path = path
        self.outcomes: dict[Place, dict[Cell, Outcome]] = defaultdict(dict)
        if path is None:
            return
        if not path.exists():
            path.write_text(json.dumps({"of": settings}) + "\n", "utf-8")
        first, *lines = path.read_text("utf-8").splitlines()
        if json.loads(first) != {"of": settings}:
            raise SystemExit(f"{path} is of another comparison: {first}")
        for line in lines:
            row = json.loads(line)
            outcome = Outcome(*(math.nan if row[f.name] is None else row[f.name] for f in fields(Outcome)))
            self.outcomes[Place(row["task"], row["seed"], row["index"])][row["method"], row["budget"]] = outcome

    def add(self, place: Place, found: Mapping[Cell, Outcome]) -> None:
        """Keep what one item has shown."""
        self.outcomes[place].update(found)
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for (method, budget), outcome in found.items():
                values = {name: None if math.isnan(x) else round(x, 6) for name, x in asdict(outcome).items()}
                file.write(json.dumps({**asdict(place), "method": method, "budget": budget, **values}) + "\n")

    def print_task(self, task: str, methods: Sequence[str]) -> None:
        """The table of one task: means over items, with 95 % intervals."""
        cells: dict[Cell, list[Outcome]] = defaultdict(list)
        for place, found in self.outcomes.items():
            for cell, outcome in found.items() if place.task == task else ():
                cells[cell].append(outcome)
        if not cells:
            return
        titles = ("items", "KL", "top-1", "perplexity, %", "answer", "recall", "tokens")
        print(f"\n{task}\n{'method':<10} {'budget':>6}  {titles[0]:>5}  " + "  ".join(f"{t:<15}" for t in titles[1:]))
        for (method, budget), outcomes in sorted(cells.items(), key=lambda item: (item[0][1], _rank(methods, item[0]))):
            shown = [_shown(f.name, [getattr(outcome, f.name) for outcome in outcomes]) for f in fields(Outcome)]
            print(f"{method:<10} {budget or 'all':>6}  {len(outcomes):>5}  " + "  ".join(f"{s:<15}" for s in shown),
                  flush=True)


def _rank(methods: Sequence[str], cell: Cell) -> int:
    return methods.index(cell[0]) if cell[0] in methods else len(methods)


def _shown(name: str, values: Sequence[float]) -> str:
    mean, half = summary(values)
    if math.isnan(mean):
        return "-"
    if name == "nll_difference":  # as readers know it: how much more perplexed than with full attention
        return f"{100 * math.expm1(mean):+.2f} +- {100 * half:.2f}"
    return f"{mean:.0f}" if name == "n_attended" else f"{mean:.3f} +- {half:.3f}"


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by the normal approximation."""
    known = np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return math.nan, math.nan
    half = 1.96 * float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return float(known.mean()), half


def settings_of(**values: Any) -> dict[str, Any]:
    """What must be the same for outcomes to stand in one table, as JSON reads it back."""
    settings: dict[str, Any] = json.loads(json.dumps(values))
    return settings
