"""One page that can be sent to somebody: device, plan, results and drawings, in a file that needs nothing else.

The page names the model's file but no directory, no host and no person. Beside it lies results.json, which is what
`-o json` prints, for --compare.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from apps.bench.formats import cells
from apps.bench.plots import as_svg, require_matplotlib
from edgert.errors import UsageError
from edgert.units import format_bytes

Row = Mapping[str, Any]
PAGE, RESULTS = "report.html", "results.json"
_COLUMNS = ("engine", "test", "t/s", "ratio", "predicted", "first token", "peak RSS", "read/token", "wait/token",
            "J/token")
_HEADINGS = {"t/s": "tokens/s", "ratio": "× baseline", "predicted": "predicted tokens/s", "first token": "first token",
             "read/token": "read per token", "wait/token": "waited per token", "J/token": "J per token"}
_NAMES = {"avg_ttft_ns": "time to first token", "temperature_c": "temperature", "clock_mhz": "clock",
          "throttled": "throttling", "kv_overlap": "overlap of selected keys and values",
          "predicted_ts": "prediction"}
_STYLE = """
:root { color-scheme: light; font: 15px/1.5 system-ui, sans-serif; color: #1c2024; background: #fff; }
body { max-width: 76rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #d9dde1; }
thead th { font-weight: 600; border-bottom: 2px solid #9aa1a8; } .n { text-align: right; } td.n { white-space: nowrap; }
svg { max-width: 100%; height: auto; } .note { color: #59616a; } .flag { color: #a03000; font-weight: 600; }
"""


def check_report(directory: Path) -> None:
    """Say before anything is measured that the page cannot be written. Raises UsageError."""
    require_matplotlib("--report")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK | os.X_OK)
        # Root may write everywhere but where nobody can.
        probe = directory / f".{PAGE}.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--report {directory}: {error.strerror}", "Name a directory that can be written.") from error
    if not writable:
        raise UsageError(f"--report {directory}: it cannot be written", "Name a directory that can be written.")


def write_report(directory: Path, rows: Sequence[Row]) -> Path:
    """Write the page and its results; the page's path. Raises UsageError where they cannot be written."""
    try:
        (directory / RESULTS).write_text(json.dumps(rows, indent=2) + "\n")
        (directory / PAGE).write_text(page(rows))
    except OSError as error:
        raise UsageError(f"--report {directory}: {error.strerror}", "Name a directory that can be written.") from error
    return directory / PAGE


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    first = rows[0]
    told = first["environment"]
    title = f"{told.get('model_name') or first['model_type']} on {told.get('device') or told.get('cpu')}"
    body = [f"<h1>{escape(title)}</h1>",
            f"<p class=note>Measured {escape(first['test_time'])} by edgert {escape(str(told.get('edgert_version')))}. "
            f"Mean ± standard deviation of {first['repetitions']} runs, all of the same tokens; a rate of generation "
            "counts from the first token to the last.</p>",
            *_results(rows), "<h2>Drawings</h2>", f"<div class=scroll>{as_svg(rows)}</div>",
            *_setups(rows), *_device(first), *_reasons(rows)]
    return ("<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport "
            'content="width=device-width, initial-scale=1"><link rel=icon href="data:,">'
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body)
            + "\n</body></html>\n")


def _results(rows: Sequence[Row]) -> Iterator[str]:
    yield "<h2>Results</h2>"
    shown = [({"budget": "none"} | {name: text for name, text in cells(row).items() if text}, row) for row in rows]
    sweeps = [name for name in ("budget", "threads", "batch", "layout") if len({one[name] for one, _ in shown}) > 1]
    columns = [*sweeps, *(name for name in _COLUMNS if any(name in one for one, _ in shown))]
    yield "<div class=scroll><table><thead><tr>" + "".join(
        f"<th{_class(name)}>{escape(_HEADINGS.get(name, name))}</th>" for name in columns) + "</tr></thead><tbody>"
    for one, row in shown:
        flag = " <span class=flag>the clock dropped</span>" if row["throttled"] else ""
        yield "<tr>" + "".join(f"<td{_class(name)}>{escape(one.get(name, ''))}{flag if name == 't/s' else ''}</td>"
                               for name in columns) + "</tr>"
    yield "</tbody></table></div>"


def _setups(rows: Sequence[Row]) -> Iterator[str]:
    """How the model ran, setup by setup: what lay where."""
    yield "<h2>Plan</h2>"
    seen = set()
    for row in rows:
        if row["engine"] != "edgert" or (key := json.dumps(row["plan"] | {"b": row["memory_budget_bytes"]})) in seen:
            continue
        seen.add(key)
        budget = row["memory_budget_bytes"]
        within = "Without a budget" if budget is None else f"Within {format_bytes(budget)}"
        yield f"<p><b>{escape(within)}</b>: " + escape("; ".join(
            f"{name.replace('_bytes', '').replace('_', ' ')} {_value(name, value)}"
            for name, value in row["plan"].items())) + f"; page cache {escape(row['page_cache'] or 'unknown')}.</p>"


def _device(row: Row) -> Iterator[str]:
    yield "<h2>Device and build</h2><table><tbody>"
    told = dict(row["environment"])
    disk = told.pop("disk", None) or {}
    told["disk, raw reads"] = f"{disk['bytes_s'] / 1e9:.2f} GB/s" if "bytes_s" in disk else None
    told["model"] = f"{row['model_type']}, {format_bytes(row['model_size'])}"
    for name, value in told.items():
        if value is not None:
            yield f"<tr><th>{escape(name.removesuffix('_bytes').replace('_', ' '))}</th>" \
                  f"<td>{escape(_value(name, value))}</td></tr>"
    yield "</tbody></table>"


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """What was not measured, and why."""
    ours = [row for row in rows if row["engine"] == "edgert"]
    whys = {name: why for row in ours for name, why in row["reasons"].items()
            if all(other.get(name) is None for other in ours)}
    if whys:
        yield "<h2>Not measured</h2><ul class=note>" + "".join(
            f"<li>{escape(_NAMES.get(name, name.replace('_', ' ')))}: {escape(why)}</li>"
            for name, why in whys.items()) + "</ul>"


def _class(name: str) -> str:
    return "" if name in ("engine", "test", "layout") else " class=n"


def _value(name: str, value: object) -> str:
    return format_bytes(value) if "_bytes" in name and isinstance(value, int) else str(value)
