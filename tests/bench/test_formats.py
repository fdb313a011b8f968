from __future__ import annotations

import csv
import io
import json

import pytest

from apps.bench.formats import FormatName, Subject, format_named, parameters
from apps.bench.measure import Result, SpeedTest

SUBJECT = Subject("edgert-1", 'a "fast" CPU', "m.gguf", "llama 135M Q4_1", 96_576_768, 134_515_008, 512, 2, "f16",
                  "auto")
RESULTS = [Result(SpeedTest(512, 0, 0), "2025-01-01T00:00:00Z", (10**9, 2 * 10**9)),
           Result(SpeedTest(0, 128, 512), "2025-01-01T00:00:01Z", (10**9,))]
# What llama-bench's readers (compare-llama-bench.py and its like) look for.
FIELDS = {"build_commit", "model_filename", "model_type", "model_size", "model_n_params", "n_batch", "n_ubatch",
          "n_threads", "type_k", "type_v", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns",
          "avg_ts", "stddev_ts"}
SAMPLES = {"samples_ns", "samples_ts"}


def _written(name: FormatName) -> list[str]:
    form = format_named(name, SUBJECT, [result.test.name for result in RESULTS])
    return [*form.head(), *(line for result in RESULTS for line in form.row(result)), *form.foot()]


def test_markdown_is_a_table_whose_columns_stand_under_each_other() -> None:
    head, rule, first, second = _written("md")
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["model", "size", "params", "backend", "threads", "test",
                                                                 "t/s"]
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "llama 135M Q4_1", "92.1 MiB", "134.52 M", "CPU", "2", "pp512", "384.00 ± 181.02"]
    assert "tg128 @ d512 |" in second
    assert len({len(line) for line in (head, rule, first, second)}) == 1
    assert rule.count("-:") == 5  # numbers stand on the right


def test_json_lines_have_llama_benchs_fields() -> None:
    first, second = map(json.loads, _written("jsonl"))
    assert first.keys() >= FIELDS | SAMPLES
    assert (first["n_prompt"], first["n_gen"], first["n_depth"], first["samples_ts"]) == (512, 0, 0, [512.0, 256.0])
    assert (second["n_gen"], second["n_depth"], second["avg_ns"]) == (128, 512, 10**9)


def test_json_is_one_array_even_when_nothing_was_done() -> None:
    assert json.loads("\n".join(_written("json"))) == [json.loads(line) for line in _written("jsonl")]
    assert json.loads("\n".join(format_named("json", SUBJECT, []).foot())) == []


def test_csv_reads_back_without_samples() -> None:
    rows = list(csv.DictReader(io.StringIO("\n".join(_written("csv")))))
    assert len(rows) == 2 and rows[0].keys() >= FIELDS and not rows[0].keys() & SAMPLES
    assert rows[0]["cpu_info"] == 'a "fast" CPU'


@pytest.mark.parametrize(("number", "shown"), [(134_515_008, "134.52 M"), (7_615_616_512, "7.62 B")])
def test_parameters_are_written_as_llama_bench_does(number: int, shown: str) -> None:
    assert parameters(number) == shown
