"""Two results of `edgert bench -o json` beside each other: what changed, and whether it is more than noise.

Pure but for reading the files, which may come from anybody: their size and their fields are checked.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.bench.speed import deviation
from edgert.errors import UsageError
from edgert.models.names import printable
from edgert.units import format_bytes

Row = Mapping[str, Any]
_MAX_FILE_BYTES = 64 * 2**20
_MAX_ROWS = 10_000
# What makes two rows the same measurement. The model by what it is, for a file may have been moved.
_KEY = ("model_type", "engine", "test", "memory_budget_bytes", "n_threads", "n_batch", "layout", "type_k")
_SETTINGS = ("page_cache", "limit_bytes", "context_length", "seed")
_ENVIRONMENT = ("edgert_version", "edgert_commit", "ggml_version", "device", "cpu", "kernel", "governor", "power_mode",
                "model_sha256")
# Student's t for 95 % on both sides, by degrees of freedom; beyond the last, the normal distribution's.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T95_FAR = 1.96
_WIDTHS = (24, 17, 17, 8)


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two sets of samples: their medians, the relative change, and the change that chance makes in 19 of 20 cases
    (of the means, Welch); None where a side has a single sample."""

    a: float
    b: float
    change: float
    noise: float | None

    @property
    def is_noise(self) -> bool:
        return self.noise is not None and abs(self.change) <= self.noise


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """From `a` to `b`."""
    before, after = statistics.median(a), statistics.median(b)
    noise = None
    if len(a) > 1 and len(b) > 1:
        parts = [deviation(side) ** 2 / len(side) for side in (a, b)]
        total = sum(parts)
        freedom = total**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (a, b), strict=True)) \
            if total else math.inf
        noise = _t95(freedom) * math.sqrt(total) / statistics.fmean(a)
    return Difference(before, after, after / before - 1, noise)


def _t95(freedom: float) -> float:
    return _T95[max(1, int(freedom)) - 1] if freedom < len(_T95) + 1 else _T95_FAR


def compare(a_path: Path, b_path: Path) -> Iterator[str]:
    """Lines of a table of 80 columns, and what else differs. Raises UsageError for files that are no results."""
    a, b = _by_key(read_rows(a_path)), _by_key(read_rows(b_path))
    both = [key for key in a if key in b]
    if not both:
        raise UsageError("these results have no test in common",
                         "Measure the same model with the same tests, threads, batch, layout and --memory.")
    yield _line("test", "A", "B", "change", "")
    for key in both:
        found = difference(a[key]["samples_ts"], b[key]["samples_ts"])
        yield _line(_name(a[key], [a[other] for other in both]), _speed(a[key]), _speed(b[key]),
                    f"{found.change:+.1%}", _verdict(found))
    yield "A and B are medians in tokens/s, ± the samples' standard deviation."
    for name, only, other in (("A", a, b), ("B", b, a)):
        missing = [only[key]["test"] for key in only if key not in other]
        if missing:
            yield f"only in {name}: {', '.join(missing)}"
    yield from _other_differences(a[both[0]], b[both[0]])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON array or of JSON lines. Raises UsageError."""
    help_ = "Name files that `edgert bench MODEL -o json` has written."
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", help_) from error
    if len(raw) > _MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {format_bytes(_MAX_FILE_BYTES)}", help_)
    try:
        text = raw.decode()
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is no JSON", help_) from None
    if not isinstance(rows, list) or not 0 < len(rows) <= _MAX_ROWS or not all(map(_is_row, rows)):
        raise UsageError(f"{path} holds no results of edgert bench", help_)
    return rows


def _is_row(value: object) -> bool:
    if not isinstance(value, dict) or not all(name in value for name in (*_KEY, "samples_ts", "environment")):
        return False
    samples = value["samples_ts"]
    return isinstance(value["environment"], dict) and isinstance(samples, list) and len(samples) > 0 and all(
        type(sample) in (int, float) and sample > 0 and math.isfinite(sample) for sample in samples)


def _by_key(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {json.dumps([row[name] for name in _KEY]): row for row in rows}


def _name(row: Row, rows: Sequence[Row]) -> str:
    """The test, with what tells it from others of the table."""
    parts = [str(row["test"])]
    if len({one["engine"] for one in rows}) > 1:
        parts.append(str(row["engine"]))
    if len({one["memory_budget_bytes"] for one in rows}) > 1 and type(row["memory_budget_bytes"]) is int:
        parts.append(format_bytes(row["memory_budget_bytes"]))
    parts += [str(row[name]) for name in ("layout", "n_threads", "n_batch") if len({one[name] for one in rows}) > 1]
    return printable(" ".join(parts))


def _speed(row: Row) -> str:
    return f"{statistics.median(row['samples_ts']):.2f} ± {deviation(row['samples_ts']):.2f}"


def _verdict(found: Difference) -> str:
    if found.noise is None:
        return "one run is no proof"
    return f"noise (±{found.noise:.1%})" if found.is_noise else ("faster" if found.change > 0 else "slower")


def _other_differences(a: Row, b: Row) -> Iterator[str]:
    pairs = [(name, a["environment"].get(name), b["environment"].get(name)) for name in _ENVIRONMENT]
    for name, before, after in [*pairs, *((name, a.get(name), b.get(name)) for name in _SETTINGS)]:
        if before != after:
            yield printable(f"{name}: {str(before)[:60]} -> {str(after)[:60]}")


def _line(*shown: str) -> str:
    first, *figures, verdict = shown
    name_width, *widths = _WIDTHS
    return (first.ljust(name_width) + "".join(f"{figure:>{width}}" for figure, width in zip(figures, widths,
                                                                                        strict=True)) +
            f"  {verdict}").rstrip()
