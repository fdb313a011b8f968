from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rows import SUBJECT, answer, prompt, rows, sweep

from apps.bench.compare import compare, difference, read_rows
from apps.bench.results import row
from edgert.errors import UsageError


def _file(path: Path, of: Any) -> Path:
    path.write_text(json.dumps(of))
    return path


def test_a_change_beyond_the_noise_is_told_from_noise() -> None:
    faster = difference([10.0, 10.1, 9.9, 10.0, 10.0], [12.0, 12.1, 11.9, 12.0, 12.0])
    assert faster.change == pytest.approx(0.2) and not faster.is_noise and (faster.noise or 1) < 0.02
    noise = difference([10.0, 12.0, 8.0, 11.0, 9.0], [10.5, 12.5, 8.5, 11.5, 9.5])
    assert noise.change == pytest.approx(0.05) and noise.is_noise
    # Welch's interval for two samples of five with one variance: t(8) = 2.306 times the difference's deviation.
    assert noise.noise == pytest.approx(2.306 * (2.5 / 5 * 2) ** 0.5 / 10)


def test_one_run_proves_nothing_and_equal_runs_are_no_error() -> None:
    assert difference([10.0], [12.0]).noise is None
    same = difference([10.0, 10.0], [10.0, 10.0])
    assert (same.change, same.noise, same.is_noise) == (0.0, 0.0, True)


def test_rows_of_the_same_test_are_put_beside_each_other(tmp_path: Path) -> None:
    a = _file(tmp_path / "a.json", [row(SUBJECT, prompt((1.0, 1.01, 0.99)))])
    after = [row(SUBJECT, prompt((0.5, 0.505, 0.495))), row(SUBJECT, answer())]
    after[0]["environment"] = {**after[0]["environment"], "governor": "performance"}
    lines = [*compare(a, _file(tmp_path / "b.json", after))]
    assert lines[1].split() == ["pp512", "512.00", "±", "5.12", "1024.00", "±", "10.24", "+100.0%", "faster"]
    assert "only in B: tg5 @ d64" in lines and "governor: schedutil -> performance" in lines
    assert max(map(len, lines)) <= 80


def test_a_sweep_names_its_budgets(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.json", sweep())
    lines = [*compare(path, path)]
    assert [line.split("  ")[0] for line in lines[1:5]] == ["pp512 128.0 MiB", "tg5 @ d64 128.0 MiB",
                                                            "pp512 256.0 MiB", "tg5 @ d64 256.0 MiB"]
    assert max(map(len, lines)) <= 90


def test_json_lines_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows())) + "\n")
    assert len(read_rows(path)) == 3


@pytest.mark.parametrize("content", [
    "", "{", "[]", "[1]", "[{}]", '{"a": 1}', "[" * 100_000, json.dumps([{"samples_ts": [1]}]), "\x00",
])
def test_what_is_no_result_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError) as refusal:
        read_rows(tmp_path / "x.json")
    assert "x.json" in refusal.value.message and "-o json" in refusal.value.next_step


def test_samples_that_lie_are_refused(tmp_path: Path) -> None:
    for samples in ([], [0], [-1.0], ["1"], [True], None, [float("nan")]):
        with pytest.raises(UsageError):
            read_rows(_file(tmp_path / "x.json", [rows()[0] | {"samples_ts": samples}]))


def test_results_without_a_common_test_and_missing_files_are_refused(tmp_path: Path) -> None:
    a = _file(tmp_path / "a.json", [row(SUBJECT, prompt())])
    with pytest.raises(UsageError, match="no test in common"):
        [*compare(a, _file(tmp_path / "b.json", [row(SUBJECT, answer())]))]
    with pytest.raises(UsageError, match="No such file"):
        [*compare(a, tmp_path / "none.json")]
