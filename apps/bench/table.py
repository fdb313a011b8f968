"""How results look on a terminal of 80 columns: a line that says what is measured, and a table below it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from apps.bench.formats import cells, seconds
from edgert.units import format_bytes

Row = Mapping[str, Any]
_COLUMNS = (("test", 15), ("t/s", 16), ("predicted", 9), ("first token", 11), ("peak RSS", 9), ("read/token", 10))
_WIDTH = 80


class Table:
    """A heading for every setup, then a row a test; what belongs to a row but not into a column stands below it."""

    def __init__(self) -> None:
        self._setup: tuple[object, ...] = ()
        self._missing: dict[str, str] = {}

    def head(self) -> Iterator[str]:
        return iter(())

    def rows(self, rows: Sequence[Row]) -> Iterator[str]:
        first = rows[0]
        setup = tuple(first[name] for name in ("memory_budget_bytes", "n_threads", "n_batch", "layout"))
        if setup != self._setup:
            yield from ([""] if self._setup else [])
            yield from _heading(first)
            yield _line({name: name for name, _ in _COLUMNS})
            self._setup = setup
        for row in rows:
            shown = cells(row)
            yield _line(shown if row["engine"] == "edgert" else shown | {"test": f"  {row['engine']}"})
            yield from _notes(row)
        self._missing |= {name: why for name, why in first["reasons"].items() if name in ("energy", "throttled")}

    def foot(self) -> Iterator[str]:
        names = {"energy": "energy", "throttled": "throttling"}
        for name, why in self._missing.items():
            yield from _folded(f"{names[name]} was not measured: {why}")


def _heading(row: Row) -> Iterator[str]:
    budget = row["memory_budget_bytes"]
    within = "no budget" if budget is None else f"budget {format_bytes(budget)}"
    plan, limit = row["plan"], " in a control group of that size" if row["limit_bytes"] else ""
    how = f"{plan['weights']}, " if "weights" in plan else ""
    threads = f"{row['n_threads']} thread{'s' * (row['n_threads'] > 1)}"
    yield from _folded(f"{row['model_type']}, {format_bytes(row['model_size'])}; {within}{limit}; {how}"
                       f"{threads}, batch {row['n_batch']}, layout {row['layout']}, "
                       f"page cache {row['page_cache'] or 'unknown'}")


def _notes(row: Row) -> Iterator[str]:
    if row["ratio_to_baseline"] is not None:
        yield f"    {row['ratio_to_baseline']:.3f} times {row['baseline']}"
    if row["wait_ns_per_token"]:
        yield f"    waited {seconds(row['wait_ns_per_token'])} a token for weights"
    if row["expert_hit_rate"] is not None:
        yield f"    {row['expert_hit_rate']:.1%} of the experts were in memory"
    if row["avg_watts"] is not None:
        parts = [f"{row[f'joules_per_{kind}_token']:.3g} J per {name} token" for kind, name in
                 (("prompt", "prompt"), ("gen", "generated")) if row[f"joules_per_{kind}_token"] is not None]
        yield f"    {row['avg_watts']:.2f} W on {row['energy_rail']}; {', '.join(parts)}"
    if row["throttled"]:
        yield "    the clock dropped meanwhile: this row is slower than the device"


def _line(shown: Mapping[str, str]) -> str:
    first, *others = _COLUMNS
    return (shown[first[0]].ljust(first[1]) + "".join(f" {shown[name]:>{width}}" for name, width in others)).rstrip()


def _folded(text: str) -> Iterator[str]:
    from textwrap import wrap

    yield from wrap(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
