"""Writes the README's performance section from what was measured: benchmarks/results/*.json.

    edgert bench MODEL --baseline llama.cpp -o json > benchmarks/results/NAME.json
    python benchmarks/readme.py            write it
    python benchmarks/readme.py --check    only say whether it is up to date (exit status 1: it is not)

Every figure of the section comes from these files, with the device that they were measured on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from apps.bench.compare import read_rows
from apps.bench.formats import cells
from edgert.units import format_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- performance: written by benchmarks/readme.py -->", "<!-- end of performance -->"
Row = Mapping[str, Any]
_SAME_DEVICE = ("device", "cpu", "n_cpus", "memory_bytes", "kernel", "edgert_version", "edgert_commit", "ggml_version")


def section(files: Sequence[Sequence[Row]]) -> str:
    """The section's text, a table for each device, in the order of the files."""
    rows = [row for file in files for row in file]
    parts = []
    for device, own in groupby(rows, key=lambda row: tuple(row["environment"].get(name) for name in _SAME_DEVICE)):
        parts.append(_table(dict(zip(_SAME_DEVICE, device, strict=True)), [*own]))
    return "\n\n".join(parts)


def _table(device: Mapping[str, Any], rows: Sequence[Row]) -> str:
    peers = {_key(row): row for row in rows if row["engine"] != "edgert"}
    disk = rows[0]["environment"]["disk"]["bytes_s"] / 1e9
    where = f"{device['device']} ({device['cpu']})" if device["device"] else device["cpu"]
    lines = [f"On {where}, {rows[0]['n_threads']} of {device['n_cpus']} cores, {format_bytes(device['memory_bytes'])}, "
             f"a disk of {disk:.1f} GB/s, Linux {device['kernel']};",
             f"edgert {device['edgert_version']} ({device['edgert_commit']}), ggml {device['ggml_version']}, "
             f"{rows[0]['test_time'][:10]}. Tokens per second, mean ± deviation of {rows[0]['repetitions']} runs:", "",
             "| model | memory | test | edgert | predicted | llama.cpp | ratio | first token | peak RSS |",
             "|---|---:|---|---:|---:|---:|---:|---:|---:|"]
    for row in (row for row in rows if row["engine"] == "edgert"):
        shown, peer = cells(row), peers.get(_key(row))
        limit = " limit" if row["limit_bytes"] else ""
        lines.append("| " + " | ".join((
            row["environment"]["model_name"].removesuffix(".gguf"), (shown["budget"] or "free") + limit, shown["test"],
            shown["t/s"], shown["predicted"], "" if peer is None else cells(peer)["t/s"], shown["ratio"],
            shown["first token"], shown["peak RSS"])) + " |")
    return "\n".join(lines)


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("model_type", "test", "memory_budget_bytes", "n_threads", "n_batch"))


def read_results(directory: Path = RESULTS) -> list[list[dict[str, Any]]]:
    """Every file's rows, by name."""
    return [read_rows(path) for path in sorted(directory.glob("*.json"))]


def updated(readme: str, text: str) -> str:
    """The README with the section's text between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text()
    after = updated(before, section(read_results()))
    if args.check:
        sys.exit(0 if after == before else "README.md is not up to date: run benchmarks/readme.py")
    path.write_text(after)


if __name__ == "__main__":
    main()
