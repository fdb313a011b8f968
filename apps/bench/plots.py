"""Draws results: speed test by test, and over the memory budget where that was swept.

matplotlib is an extra, imported only here, and only once everything is measured.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgert.errors import UsageError

Row = Mapping[str, Any]
_MIB = 2**20
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_PANEL_INCHES = (5.6, 4.2)


def check_plot(path: Path) -> None:
    """Say before anything is measured that a plot cannot be drawn or written. Raises UsageError."""
    if path.suffix.lower() not in (".svg", ".png"):
        raise UsageError(f"--plot {path}: the name must end in .svg or .png")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no such directory", "Name a file in one that exists.")
    require_matplotlib("--plot")


def require_matplotlib(option: str) -> None:
    """Raises UsageError where it is missing; does not import it yet."""
    if find_spec("matplotlib") is None:
        raise UsageError(f"{option} needs matplotlib, which is not installed",
                         "Install it with `pip install 'edgert[plot]'`.")


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Write the drawing, every panel side by side. Raises UsageError where it cannot be written."""
    figure = draw(rows)
    try:
        figure.savefig(path, format=path.suffix[1:].lower(), dpi=120)
    except OSError as error:
        raise UsageError(f"--plot {path}: {error.strerror}", "Name a file that can be written.") from error


def as_svg(rows: Sequence[Row]) -> str:
    """The drawing as an SVG element, without the prologue of a file."""
    text = io.StringIO()
    draw(rows).savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg"):]


def draw(rows: Sequence[Row]) -> Any:
    """A matplotlib figure: a sweep's curves, or a bar for each test; prompts and answers apart, for they differ by
    powers of ten; and time to the first token and memory."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.fonttype"] = "path"  # letters as shapes: the page looks alike everywhere
    rcParams["svg.hashsalt"] = "edgert"
    budgets = {row["memory_budget_bytes"] for row in rows}
    panels = [(title, some) for title, some in (
        ("Prompt", [row for row in rows if not row["n_gen"]]),
        ("Generation", [row for row in rows if row["n_gen"] and not row["n_prompt"]]),
        ("Prompt and generation", [row for row in rows if row["n_gen"] and row["n_prompt"]])) if some]
    n_rows = -(-(len(panels) + 1) // 2)
    figure = Figure(figsize=(2 * _PANEL_INCHES[0], n_rows * _PANEL_INCHES[1]), layout="constrained")
    axes = [*figure.subplots(n_rows, 2, squeeze=False).flat][:len(panels) + 1]
    for axis in [*figure.axes][len(axes):]:
        axis.remove()
    *axes, last = axes
    for axis, (title, some) in zip(axes, panels, strict=True):
        axis.set_title(f"{title}: speed")
        (_curves if len(budgets) > 1 else _bars)(axis, some)
        axis.set_ylabel("tokens per second")
        axis.set_ylim(bottom=0)
        _legend(axis)
    _memory(last, rows)
    return figure


def _bars(axis: Any, rows: Sequence[Row]) -> None:
    """A bar for each test and contender, every sample on it, and what was predicted."""
    names = [*dict.fromkeys(_series(row, rows) for row in rows)]
    tests = [*dict.fromkeys(str(row["test"]) for row in rows)]
    width = 0.8 / len(names)
    predicted: tuple[list[float], list[float]] = [], []
    for number, name in enumerate(names):
        own = [row for row in rows if _series(row, rows) == name]
        places = [tests.index(str(row["test"])) - 0.4 + width * (number + 0.5) for row in own]
        axis.bar(places, [row["median_ts"] for row in own], width * 0.9, label=f"{name}, median",
                 color=_COLOURS[number % len(_COLOURS)], alpha=0.65)
        points = [(place, sample) for place, row in zip(places, own, strict=True) for sample in row["samples_ts"]]
        axis.plot(*zip(*points, strict=True), ".", color="black", markersize=4,
                  label="single runs" if number == 0 else None)
        for place, row in zip(places, own, strict=True):
            if row["predicted_ts"] is not None:
                predicted[0].append(place)
                predicted[1].append(row["predicted_ts"])
    if predicted[0]:
        axis.plot(*predicted, "D", color="tab:red", markersize=5, fillstyle="none", label="predicted")
    axis.set_xticks(range(len(tests)), tests)
    axis.set_xlabel("test")


def _curves(axis: Any, rows: Sequence[Row]) -> None:
    """Speed over the budget, measured and predicted, a curve for each test and contender."""
    for number, name in enumerate(dict.fromkeys(f"{row['test']} {_series(row, rows)}" for row in rows)):
        own = sorted((row for row in rows if f"{row['test']} {_series(row, rows)}" == name and
                      row["memory_budget_bytes"] is not None), key=lambda row: int(row["memory_budget_bytes"]))
        budgets, colour = [row["memory_budget_bytes"] / _MIB for row in own], _COLOURS[number % len(_COLOURS)]
        axis.errorbar(budgets, [row["median_ts"] for row in own], [row["stddev_ts"] for row in own], marker="o",
                      capsize=3, label=name, color=colour)
        known = [(x, row["predicted_ts"]) for x, row in zip(budgets, own, strict=True) if row["predicted_ts"]]
        if known:
            axis.plot(*zip(*known, strict=True), ":", color=colour, label=f"{name}, predicted")
    axis.set_xlabel("memory budget, MiB")


def _memory(axis: Any, rows: Sequence[Row]) -> None:
    """The most memory that each contender's process took, setup by setup."""
    peaks: dict[str, float] = {}
    for row in rows:
        budget = row["memory_budget_bytes"]
        within = "no budget" if budget is None else f"{budget / _MIB:.0f} MiB"
        name = f"{_series(row, rows)}\n{within}"
        peaks[name] = max(peaks.get(name, 0.0), (row["peak_rss_bytes"] or 0) / _MIB)
    axis.barh([*peaks], [*peaks.values()], color="tab:grey", label="peak RSS", height=0.6)
    axis.axvline(rows[0]["model_size"] / _MIB, color="black", linestyle=":", label="the model's weights")
    axis.set_title("Memory")
    axis.set_xlabel("MiB")
    axis.set_ylabel("contender and budget")
    axis.invert_yaxis()
    _legend(axis)


def _legend(axis: Any) -> None:
    """Below the panel, where it covers nothing."""
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _series(row: Row, rows: Sequence[Row]) -> str:
    """The contender, with what tells it from the others."""
    parts = [str(row["engine"])]
    for name, what in (("layout", "{}"), ("n_threads", "{} threads"), ("n_batch", "batch {}")):
        if len({one[name] for one in rows}) > 1:
            parts.append(what.format(row[name]))
    return ", ".join(parts)
