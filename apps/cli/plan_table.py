"""How `edgert plan` looks on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from apps.cli.plan_report import Report, Target
from edgert.memory.profile import Limit
from edgert.models.names import printable
from edgert.units import format_bytes

_WIDTH = 80
_MAX_NAME_WIDTH = 26
_REMEDIES: dict[Limit, str] = {
    "disk": "more memory or a faster disk", "memory bandwidth": "a smaller quantisation, or faster memory",
    "compute": "more or faster cores"}


def print_report(report: Report) -> None:
    """The plan, where memory goes, and what to expect."""
    console = _console()
    streams = f"{format_bytes(int(report.read_bytes))} are read for every token" if report.read_bytes else \
        "everything stays in memory"
    console.print(f"[bold]{_escaped(report.name)}[/bold]  {format_bytes(report.file_bytes)}, {streams}")
    whose = "the budget" if report.budget_is_given else "what is left here"
    console.print(_memory_table(report, f"{format_bytes(report.budget_bytes)}, {whose}"))
    console.print(_speed_table(report))
    if report.target is not None:
        console.print(_target_line(report.target, report.tok_s))


def print_ranking(reports: Sequence[Report], refused: Mapping[str, str]) -> None:
    """Every model, fastest first; below, those that cannot run and why."""
    console, table = _console(), Table(box=None, pad_edge=False)
    table.add_column("model", max_width=_MAX_NAME_WIDTH, no_wrap=True)
    for title in ("size", "weights", "tok/s", "1st token", "limit"):
        table.add_column(title, justify="left" if title in ("weights", "limit") else "right", no_wrap=True)
    for report in reports:
        table.add_row(_escaped(report.name), format_bytes(report.file_bytes), report.plan.sizes.weights,
                      f"{report.tok_s:.1f}", _seconds(report.time_to_first_token_s), report.limit.split()[0])
    if reports:
        console.print(table)
    for name, problem in refused.items():
        console.print(f"{_escaped(name)}: {_escaped(problem)}")
    if not reports and not refused:
        console.print("No models yet. `edgert pull smollm2-135m` fetches the default one (94 MiB).")


def _memory_table(report: Report, budget: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(min_width=22)
    table.add_column(justify="right", min_width=12)
    table.add_column()
    for name, n_bytes in report.memory.items():
        table.add_row(f"  {name}", format_bytes(n_bytes), _kv_note(report) if name == "KV cache" else "")
    table.add_row("[bold]memory at the most[/bold]", f"[bold]{format_bytes(report.plan.peak_bytes)}[/bold]",
                  f"of {budget}")
    table.add_row("  smallest that works", format_bytes(report.smallest_budget_bytes), "")
    return table


def _kv_note(report: Report) -> str:
    """How long a text, and where steps attend to a set of its tokens, how many and from where on."""
    text, kv = f"{report.plan.context_length} tokens", report.kv
    if kv is None:
        return text
    where = ", on disk" if kv.tier == "disk" else ""
    return f"{text}{where}; {kv.budget} attended from {kv.from_tokens} on"


def _speed_table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(min_width=22)
    table.add_column(justify="right", min_width=12)
    table.add_column()
    table.add_row("[bold]tokens per second[/bold]", f"[bold]{report.tok_s:.2f}[/bold]",
                  f"{report.tok_s_empty:.2f} when the context is empty, {report.tok_s_full:.2f} full")
    table.add_row("  limited by", report.limit, f"faster with {_REMEDIES[report.limit]}")
    table.add_row("  with another GiB", f"{report.tok_s_with_another_gib:.2f}", "")
    table.add_row("[bold]first token after[/bold]", f"[bold]{_seconds(report.time_to_first_token_s)}[/bold]",
                  f"a prompt of {report.prompt_tokens} tokens; limited by {report.prefill_limit}")
    return table


def _target_line(target: Target, tok_s: float) -> str:
    reached = "is reached" if target.is_reached else f"is not reached: {tok_s:.2f} are predicted"
    least = "no memory is enough for it on this device" if target.smallest_budget_bytes is None else \
        f"the smallest memory for it is {format_bytes(target.smallest_budget_bytes)}"
    return f"{target.tok_s:g} tokens/s {reached}; {least}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _escaped(text: str) -> str:
    return printable(text).replace("[", r"\[")


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.width <= _WIDTH else Console(highlight=False, width=_WIDTH)
