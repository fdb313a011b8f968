"""How results are written for programs: llama-bench's CSV, JSON array, JSON lines and SQL; and its Markdown table.

Knows rows (results.py) and columns; every format holds the same figures. What a terminal of 80 columns shows is in
table.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from apps.bench.results import Row
from edgert.units import format_bytes

FormatName = Literal["md", "csv", "json", "jsonl", "sql", "table"]
SQL_TABLE = "llama_bench"  # as llama-bench has it, so that both can be in one database
_TYPES = {bool: "INTEGER", int: "INTEGER", float: "REAL"}
# Columns whose first value may be None, so that no value tells their type.
_REAL = ("_ts", "_rate", "_share", "_share_before_load", "_overlap", "_watts", "_token", "_c", "_mhz", "_baseline")
_TEXT = ("engine", "test", "layout", "baseline", "energy_source", "energy_rail")


class Format(Protocol):
    """Lines before the first row, for each row, and after the last."""

    def head(self) -> Iterator[str]: ...

    def rows(self, rows: Sequence[Row]) -> Iterator[str]:
        """Those of one test, one for each contender."""
        ...

    def foot(self) -> Iterator[str]: ...


class Markdown:
    """llama-bench's table, as wide as it must be: columns of ours are there where the run can have them."""

    def __init__(self, *, has_baseline: bool, sweeps: Sequence[str]) -> None:
        self._columns = ["model", "size", "params", "backend", "threads",
                         *(name for name in ("budget", "batch", "layout") if name in sweeps),
                         *(["engine"] if has_baseline else []), "test", "t/s", "predicted",
                         *(["ratio"] if has_baseline else []), "first token", "peak RSS", "read/token", "wait/token",
                         "J/token"]

    def head(self) -> Iterator[str]:
        yield "| " + " | ".join(self._columns) + " |"
        yield "| " + " | ".join("---" if name in ("model", "backend", "engine", "layout", "test") else "---:"
                                for name in self._columns) + " |"

    def rows(self, rows: Sequence[Row]) -> Iterator[str]:
        for row in rows:
            shown = cells(row)
            yield "| " + " | ".join(shown[name].replace("|", r"\|") for name in self._columns) + " |"

    def foot(self) -> Iterator[str]:
        return iter(())


class _Headed:
    """Rows below a head that is made of the first of them: before it, no column is known."""

    def __init__(self) -> None:
        self._has_head = False

    def head(self) -> Iterator[str]:
        return iter(())

    def rows(self, rows: Sequence[Row]) -> Iterator[str]:
        for row in rows:
            if not self._has_head:
                self._has_head = True
                yield from self._columns(row)
            yield self._values(row)

    def foot(self) -> Iterator[str]:
        return iter(())

    def _columns(self, row: Row) -> Iterator[str]:
        raise NotImplementedError

    def _values(self, row: Row) -> str:
        raise NotImplementedError


class Csv(_Headed):
    """Every value in quotes; lists and objects as JSON; None is empty."""

    def _columns(self, row: Row) -> Iterator[str]:
        yield ",".join(row)

    def _values(self, row: Row) -> str:
        return ",".join('"' + ("" if value is None else str(value)).replace('"', '""') + '"'
                        for value in map(flat, row.values()))


class JsonLines:
    """One object a line."""

    def head(self) -> Iterator[str]:
        return iter(())

    def rows(self, rows: Sequence[Row]) -> Iterator[str]:
        yield from map(json.dumps, rows)

    def foot(self) -> Iterator[str]:
        return iter(())


class JsonArray:
    """One array, written at the end, since an array that is cut off is none."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def head(self) -> Iterator[str]:
        return iter(())

    def rows(self, rows: Sequence[Row]) -> Iterator[str]:
        self._rows += rows
        return iter(())

    def foot(self) -> Iterator[str]:
        yield json.dumps(self._rows, indent=2)


class Sql(_Headed):
    """A table and its rows, as sqlite3 takes them: `edgert bench MODEL -o sql | sqlite3 bench.sqlite`."""

    def _columns(self, row: Row) -> Iterator[str]:
        yield f"CREATE TABLE IF NOT EXISTS {SQL_TABLE} ("
        yield ",\n".join(f"  {name} {_sql_type(name, value)}" for name, value in row.items())
        yield ");"

    def _values(self, row: Row) -> str:
        return f"INSERT INTO {SQL_TABLE} ({', '.join(row)}) VALUES ({', '.join(map(_sql_value, row.values()))});"


def format_named(name: FormatName, *, has_baseline: bool = False, sweeps: Sequence[str] = ()) -> Format:
    """The format for `name`. `sweeps` are the columns (budget, threads, batch, layout) that vary."""
    match name:
        case "md":
            return Markdown(has_baseline=has_baseline, sweeps=sweeps)
        case "csv":
            return Csv()
        case "json":
            return JsonArray()
        case "jsonl":
            return JsonLines()
        case "sql":
            return Sql()
        case "table":
            from apps.bench.table import Table

            return Table()


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row as people read it; what was not measured is empty."""
    ttft, wait, joules = row["avg_ttft_ns"], row["wait_ns_per_token"], joules_per_token(row)
    return {
        "model": str(row["model_type"]), "size": format_bytes(row["model_size"]),
        "params": parameters(row["model_n_params"]), "backend": str(row["backends"]),
        "threads": str(row["n_threads"]), "budget": _bytes(row["memory_budget_bytes"]), "batch": str(row["n_batch"]),
        "layout": str(row["layout"]), "engine": str(row["engine"]), "test": str(row["test"]),
        "t/s": f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
        "predicted": "" if row["predicted_ts"] is None else f"{row['predicted_ts']:.2f}",
        "ratio": "" if row["ratio_to_baseline"] is None else f"{row['ratio_to_baseline']:.3f}",
        "first token": "" if ttft is None else seconds(ttft), "peak RSS": _bytes(row["peak_rss_bytes"]),
        "read/token": _bytes(row["read_bytes_per_token"]), "wait/token": "" if wait is None else seconds(wait),
        "J/token": "" if joules is None else f"{joules:.3g}"}


def joules_per_token(row: Mapping[str, Any]) -> float | None:
    """Of the test's own kind of token: of the answer where it has one."""
    value = row["joules_per_gen_token"] if row["n_gen"] else row["joules_per_prompt_token"]
    return None if value is None else float(value)


def parameters(number: int) -> str:
    """`134.52 M` or `7.62 B`."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def seconds(n_ns: float) -> str:
    """`1.25 s`, `830 ms` or `0.45 ms`."""
    if n_ns >= 1e9:
        return f"{n_ns / 1e9:.2f} s"
    return f"{n_ns / 1e6:.0f} ms" if n_ns >= 1e7 or not n_ns else f"{n_ns / 1e6:.2f} ms"


def flat(value: Any) -> Any:
    """Lists and objects as JSON text, the rest as it is."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _bytes(n_bytes: int | None) -> str:
    return "" if n_bytes is None else format_bytes(n_bytes)


def _sql_type(name: str, value: Any) -> str:
    if isinstance(value, str | list | dict) or name in _TEXT:
        return "TEXT"
    return "REAL" if name.endswith(_REAL) else _TYPES.get(type(value), "INTEGER")


def _sql_value(value: Any) -> str:
    value = flat(value)
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return str(int(value))
    return repr(value) if isinstance(value, int | float) else "'" + str(value).replace("'", "''") + "'"
