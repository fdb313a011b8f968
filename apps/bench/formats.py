"""How results are written: llama-bench's Markdown table, CSV, JSON array and JSON lines, row by row as they come.

Knows columns and names; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from apps.bench.measure import Result
from edgert.units import format_bytes

FormatName = Literal["md", "csv", "json", "jsonl"]
_SPEED_WIDTH = 15  # of `1234.56 ± 12.34`; the table must not wait for the last row to know its widths


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured, under llama-bench's names. `type_k` and `type_v` are one setting here, as are the batches."""

    build_commit: str
    cpu_info: str
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    n_batch: int
    n_threads: int
    type_kv: str
    layout: str
    backends: str = "CPU"

    def row(self, result: Result) -> dict[str, Any]:
        """One result as an object, llama-bench's fields first, ours (`layout`) among them."""
        test = result.test
        return {
            "build_commit": self.build_commit, "cpu_info": self.cpu_info, "backends": self.backends,
            "model_filename": self.model_filename, "model_type": self.model_type, "model_size": self.model_size,
            "model_n_params": self.model_n_params, "n_batch": self.n_batch, "n_ubatch": self.n_batch,
            "n_threads": self.n_threads, "type_k": self.type_kv, "type_v": self.type_kv, "layout": self.layout,
            "n_prompt": test.n_prompt, "n_gen": test.n_gen, "n_depth": test.n_depth, "test_time": result.test_time,
            "avg_ns": result.avg_ns, "stddev_ns": result.stddev_ns, "avg_ts": round(result.avg_ts, 6),
            "stddev_ts": round(result.stddev_ts, 6),
        }


class Format(Protocol):
    """Lines before the first row, for each row, and after the last."""

    def head(self) -> Iterator[str]: ...

    def row(self, result: Result) -> Iterator[str]: ...

    def foot(self) -> Iterator[str]: ...


class Markdown:
    """A table for people, as wide as it must be."""

    def __init__(self, subject: Subject, tests: list[str]) -> None:
        self._cells = {"model": subject.model_type, "size": format_bytes(subject.model_size),
                       "params": parameters(subject.model_n_params), "backend": subject.backends,
                       "threads": str(subject.n_threads)}
        self._widths = {name: max(len(name), len(cell)) for name, cell in self._cells.items()} | {
            "test": max(map(len, ["test", *tests])), "t/s": _SPEED_WIDTH}

    def head(self) -> Iterator[str]:
        yield self._line({name: name for name in self._widths})
        yield "| " + " | ".join("-" * width if self._is_left(name) else "-" * (width - 1) + ":"
                                for name, width in self._widths.items()) + " |"

    def row(self, result: Result) -> Iterator[str]:
        yield self._line({**self._cells, "test": result.test.name,
                          "t/s": f"{result.avg_ts:.2f} ± {result.stddev_ts:.2f}"})

    def foot(self) -> Iterator[str]:
        return iter(())

    def _line(self, cells: Mapping[str, str]) -> str:
        return "| " + " | ".join(cells[name].ljust(width) if self._is_left(name) else cells[name].rjust(width)
                                 for name, width in self._widths.items()) + " |"

    @staticmethod
    def _is_left(name: str) -> bool:
        return name in ("model", "backend")


class Csv:
    """Every value in quotes; no samples."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._has_head = False

    def head(self) -> Iterator[str]:
        return iter(())

    def row(self, result: Result) -> Iterator[str]:
        row = self._subject.row(result)
        if not self._has_head:
            self._has_head = True
            yield ",".join(row)
        yield ",".join('"' + str(value).replace('"', '""') + '"' for value in row.values())

    def foot(self) -> Iterator[str]:
        return iter(())


class JsonLines:
    """One object a line, samples included."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def head(self) -> Iterator[str]:
        return iter(())

    def row(self, result: Result) -> Iterator[str]:
        yield json.dumps(_with_samples(self._subject, result))

    def foot(self) -> Iterator[str]:
        return iter(())


class JsonArray:
    """One array, written at the end, since an array that is cut off is none."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._rows: list[dict[str, Any]] = []

    def head(self) -> Iterator[str]:
        return iter(())

    def row(self, result: Result) -> Iterator[str]:
        self._rows.append(_with_samples(self._subject, result))
        return iter(())

    def foot(self) -> Iterator[str]:
        yield json.dumps(self._rows, indent=2)


def format_named(name: FormatName, subject: Subject, tests: list[str]) -> Format:
    """The format for `name`; `tests` are the names of the tests to come."""
    if name == "md":
        return Markdown(subject, tests)
    if name == "csv":
        return Csv(subject)
    return JsonArray(subject) if name == "json" else JsonLines(subject)


def parameters(number: int) -> str:
    """`134.52 M` or `7.62 B`."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _with_samples(subject: Subject, result: Result) -> dict[str, Any]:
    return {**subject.row(result), "samples_ns": list(result.samples_ns),
            "samples_ts": [round(sample, 3) for sample in result.samples_ts]}
