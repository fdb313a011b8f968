"""The README's figures are those of the committed results."""

from __future__ import annotations

import json

import jsonschema
import pytest
from rows import rows, sweep
from test_formats import SCHEMA

from benchmarks import readme


def test_the_readme_says_what_was_measured_and_where() -> None:
    results = readme.read_results()
    for path in sorted(readme.RESULTS.glob("*.json")):
        jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    text = (readme.ROOT / "README.md").read_text()
    assert readme.updated(text, readme.section(results)) == text, "run benchmarks/readme.py"


def test_a_section_names_the_device_and_puts_peers_beside_each_other() -> None:
    text = readme.section([rows(), sweep()])
    lines = text.splitlines()
    assert lines[0].startswith('On Board <5> (a "fast" CPU), 2 of 4 cores, 4.00 GiB, a disk of 1.5 GB/s, Linux 6.1;')
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert table[1][:5] == ["tiny & small", "free", "pp512", "384.00 ± 181.02", "256.00"]
    assert table[2][2:7] == ["tg5 @ d64", "7.50 ± 3.54", "8.00", "3.75 ± 1.77", "2.000"]
    assert [line[1] for line in table[3:]] == ["128.0 MiB", "128.0 MiB", "256.0 MiB", "256.0 MiB"]


def test_another_device_gets_a_table_of_its_own() -> None:
    other = [row | {"environment": row["environment"] | {"device": "Laptop"}} for row in sweep()]
    text = readme.section([sweep(), other])
    assert text.count("On ") == 2 and "On Laptop" in text


def test_a_readme_without_marks_is_refused() -> None:
    assert readme.updated(f"a\n{readme.BEGIN}\nold\n{readme.END}\nb", "new") == (
        f"a\n{readme.BEGIN}\nnew\n{readme.END}\nb")
    with pytest.raises(SystemExit):
        readme.updated("nothing", "new")
