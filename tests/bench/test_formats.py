from __future__ import annotations

import csv
import io
import json
import sqlite3
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rows import ENVIRONMENT, SUBJECT, answer, prompt, rows, sweep

from apps.bench import formats
from apps.bench.formats import FormatName, format_named, parameters, seconds
from apps.bench.results import Row, row
from apps.bench.table import Table

SCHEMA = json.loads((Path(formats.__file__).parent / "result.schema.json").read_text())
# What llama-bench's own readers ask for.
LLAMA_BENCH = frozenset((
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "model_size",
    "model_n_params", "n_batch", "n_ubatch", "n_threads", "cpu_mask", "cpu_strict", "poll", "type_k", "type_v",
    "n_gpu_layers", "split_mode", "main_gpu", "no_kv_offload", "flash_attn", "tensor_split", "tensor_buft_overrides",
    "use_mmap", "embeddings", "no_op_offload", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns",
    "avg_ts", "stddev_ts", "samples_ns", "samples_ts"))


def _written(name: FormatName, of: list[Row]) -> list[str]:
    form = format_named(name, has_baseline=True)
    return [*form.head(), *(line for one in of for line in form.rows([one])), *form.foot()]


def _same(value: Any, read: Any) -> bool:
    """Whether a format that knows texts and numbers gave back `value`."""
    flat = formats.flat(value)
    return read == ("" if flat is None else str(flat)) or read == flat


def test_json_is_valid_against_the_schema_and_has_llama_benchs_fields() -> None:
    for of in (rows(), sweep()):
        written = json.loads("\n".join(_written("json", of)))
        jsonschema.validate(written, SCHEMA)
        assert written == of and all(one.keys() >= LLAMA_BENCH for one in written)


def test_the_schema_refuses_what_a_result_never_is() -> None:
    for field, value in (("avg_ts", 0), ("joules_per_gen_token", 0), ("engine", "other"), ("samples_ns", []),
                         ("surprise", 1), ("expert_hit_rate", 1.5)):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate([rows()[0] | {field: value}], SCHEMA)
    for field in ("samples_ts", "environment", "reasons"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate([{name: value for name, value in rows()[0].items() if name != field}], SCHEMA)


def test_every_format_holds_the_same_figures() -> None:
    of = rows()
    assert [json.loads(line) for line in _written("jsonl", of)] == of
    read = [*csv.DictReader(io.StringIO("\n".join(_written("csv", of))))]
    for before, after in zip(of, read, strict=True):
        assert [name for name in before if not _same(before[name], after[name])] == []
    with sqlite3.connect(":memory:") as database:
        database.row_factory = sqlite3.Row
        database.executescript("\n".join(_written("sql", of)) * 2)  # twice into one table, as two runs
        found = database.execute(f"SELECT * FROM {formats.SQL_TABLE}").fetchall()
    database.close()
    assert len(found) == 2 * len(of)
    for before, stored in zip(of, found, strict=False):
        for name, value in before.items():
            flat = formats.flat(value)
            assert stored[name] == (int(flat) if isinstance(flat, bool) else flat), name
    shown = [line.split(" | ") for line in _written("md", of)[2:]]
    assert [line[6] for line in shown] == ["tg5 @ d64" if one["n_gen"] else "pp512" for one in of]
    assert [line[7] for line in shown] == [f"{one['avg_ts']:.2f} ± {one['stddev_ts']:.2f}" for one in of]


def test_known_times_give_known_figures() -> None:
    first, second, peer = rows()
    assert (first["samples_ts"], first["avg_ts"], first["median_ts"]) == ([512.0, 256.0], 384.0, 384.0)
    assert first["stddev_ts"] == pytest.approx(181.019336) and first["samples_ns"] == [10**9, 2 * 10**9]
    assert (first["avg_ttft_ns"], first["ttft_n_prompt"], first["predicted_ts"]) == (2 * 10**9, 513, 256.0)
    assert second["samples_ts"] == [10.0, 5.0]  # 4 gaps of 0.1 s and of 0.2 s: the first token's second is not in it
    assert second["gen_avg_ts"] == 7.5 and second["prompt_avg_ts"] is None
    assert (second["gen_gap_p50_ns"], second["gen_gap_p99_ns"]) == (10**8, 2 * 10**8)
    assert (second["read_bytes_per_token"], second["wait_ns_per_token"]) == (1000, 2_000_000)
    assert (second["expert_hit_rate"], second["ratio_to_baseline"], second["baseline"]) == (0.75, 2.0, "llama.cpp")
    assert (second["energy_rail"], second["joules_per_gen_token"], second["throttled"]) == ("VDD_IN", 0.125, True)
    assert peer["read_bytes_per_token"] is None and "does not tell" in peer["reasons"]["read_bytes_per_token"]


def test_what_is_null_has_its_reason() -> None:
    first = rows()[0]
    for name in ("kv_overlap", "expert_hit_rate", "temperature_c", "clock_mhz", "throttled"):
        assert first[name] is None and first["reasons"][name]
    assert first["avg_watts"] is None and first["reasons"]["energy"] == "no battery"
    unknown = row(SUBJECT, prompt(predicted_prompt_ns=None))
    assert unknown["predicted_ts"] is None and unknown["reasons"]["predicted_ts"] == "the device is not calibrated"
    assert first["environment"] == ENVIRONMENT


def test_nothing_measured_is_still_a_json_array() -> None:
    assert json.loads("\n".join(_written("json", []))) == [] and _written("sql", []) == []


def test_markdown_has_llama_benchs_columns_first_and_sweeps_where_there_are_any() -> None:
    head = [cell.strip() for cell in next(iter(format_named("md", sweeps=("budget",)).head())).split("|")[1:-1]]
    assert head[:8] == ["model", "size", "params", "backend", "threads", "budget", "test", "t/s"]
    assert "ratio" not in head and "ratio" in next(iter(format_named("md", has_baseline=True).head()))
    assert all(line.count("|") == len(head) + 1 for line in
               format_named("md", sweeps=("budget",)).rows(rows() + sweep()))


def test_a_terminal_of_80_columns_holds_the_table() -> None:
    table = Table()
    lines = [line for group in ([rows()[0]], rows()[1:], *([one] for one in sweep())) for line in table.rows(group)]
    lines += table.foot()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "no budget" in text and "budget 128.0 MiB" in text and text.count("tokens") == 0
    assert "2.000 times llama.cpp" in text and "  llama.cpp" in text
    assert "5.25 W on VDD_IN; 0.125 J per generated token" in text and "the clock dropped" in text
    assert "energy was not measured: no battery" in text


def test_wide_figures_do_not_break_the_table() -> None:
    wide = row(SUBJECT, prompt((0.0001, 0.0002), n_prompt=100_000, memory_bytes=2**40))
    assert max(map(len, Table().rows([wide]))) <= 90
    assert row(SUBJECT, answer((1e-9, 1e-9)))["avg_ts"] > 0


@pytest.mark.parametrize(("number", "shown"), [(134_515_008, "134.52 M"), (7_615_616_512, "7.62 B")])
def test_parameters_are_written_as_llama_bench_does(number: int, shown: str) -> None:
    assert parameters(number) == shown


@pytest.mark.parametrize(("n_ns", "shown"), [(1_250_000_000, "1.25 s"), (830_400_000, "830 ms"), (450_000, "0.45 ms"),
                                            (0, "0 ms")])
def test_times_are_written_in_what_suits_them(n_ns: int, shown: str) -> None:
    assert seconds(n_ns) == shown
