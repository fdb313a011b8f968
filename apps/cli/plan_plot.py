"""Draws a plan: tokens per second and memory over the budget, and over the length of the context.

matplotlib is an extra, imported only here.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.errors import UsageError
from edgert.memory.model import memory_bytes
from edgert.memory.planner import make_plan, predict_pass, smallest_budget

if TYPE_CHECKING:
    from apps.cli.plan_report import Report
    from edgert.planning import Planning

_N_POINTS = 48
_MIB = 2**20


def check_plot(path: Path) -> None:
    """Say before anything is measured that a plot cannot be drawn or written. Raises UsageError."""
    if path.suffix.lower() not in (".svg", ".png"):
        raise UsageError(f"--plot {path}: the name must end in .svg or .png")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no such directory", "Name a file in one that exists.")
    if find_spec("matplotlib") is None:  # not imported yet: its memory is none that the model's process takes
        raise UsageError("--plot needs matplotlib, which is not installed",
                         "Install it with `pip install 'edgert[plot]'`.")


def plot(path: Path, planning: Planning, report: Report) -> None:
    """Write the drawing. Raises UsageError where it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    over_budget, over_context = figure.subplots(1, 2)
    figure.suptitle(f"{report.name}: predicted on this device")
    _draw(over_budget, *_over_budget(planning, report), "budget, MiB")
    over_budget.axvline(report.budget_bytes / _MIB, color="grey", linestyle=":")
    _draw(over_context, *_over_context(planning, report), "tokens in the context")
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"--plot {path}: {error.strerror}", "Name a file that can be written.") from error


def _over_budget(planning: Planning, report: Report) -> tuple[list[float], list[float], list[float]]:
    """Budgets in MiB, tokens per second, peak memory in MiB: from the smallest budget to where everything fits."""
    demand, device = planning.demand, planning.profile
    low = smallest_budget(demand)
    high = max(report.budget_bytes if report.budget_is_given else low, low + demand.shape.file_bytes)
    budgets = [low + (high - low) * step // _N_POINTS for step in range(_N_POINTS + 1)]
    plans = [make_plan(demand, device, budget) for budget in budgets]
    half = demand.context_length // 2
    tok_s = [1 / predict_pass(demand, device, plan, 1, half).total_s for plan in plans]
    return [budget / _MIB for budget in budgets], tok_s, [plan.peak_bytes / _MIB for plan in plans]


def _over_context(planning: Planning, report: Report) -> tuple[list[float], list[float], list[float]]:
    """Tokens in the cache, tokens per second, memory in MiB, all within the one plan."""
    demand, device, plan = planning.demand, planning.profile, report.plan
    lengths = sorted({max(1, demand.context_length * step // _N_POINTS) for step in range(_N_POINTS + 1)})
    memory = [memory_bytes(demand.shape, demand.overheads, plan.sizes_at(n), n) / _MIB for n in lengths]
    tok_s = [1 / predict_pass(demand, device, plan, 1, n - 1).total_s for n in lengths]
    return [float(n) for n in lengths], tok_s, memory


def _draw(axes: Any, x: list[float], tok_s: list[float], memory_mib: list[float], label: str) -> None:
    axes.plot(x, tok_s, color="tab:blue")
    axes.set_xlabel(label)
    axes.set_ylabel("tokens/s", color="tab:blue")
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.plot(x, memory_mib, color="tab:orange", linestyle="--")
    other.set_ylabel("memory, MiB", color="tab:orange")
    other.set_ylim(bottom=0)
