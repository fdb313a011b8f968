from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import Terminal
from test_formats import SCHEMA

from apps.cli.main import main

# One thread: two would wait for each other at every operation whenever another program runs.
QUICK = ["--threads", "1", "--layout", "plain", "-r", "2", "--no-predict"]
_START = "import sys; from apps.cli.main import main; sys.exit(main())"
DEADLINE_S = 120.0


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama", vocabulary=False))  # token ids are enough


def test_a_model_without_vocabulary_is_measured_at_a_depth(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", model, "-p", "16", "-n", "4", "-pg", "8,2", "-d", "0,32", "-o", "json", *QUICK]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    jsonschema.validate(rows, SCHEMA)
    assert err == ""
    assert [(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows] == [
        (16, 0, 0), (0, 4, 0), (8, 2, 0), (16, 0, 32), (0, 4, 32), (8, 2, 32)]
    for row in rows:
        assert len(row["samples_ns"]) == 2 and min(row["samples_ns"]) > 0 and row["peak_rss_bytes"] > 2**20
        assert row["model_filename"] == model and row["model_n_params"] > 0 and row["n_threads"] == 1
        assert row["model_type"].startswith("llama ") and row["type_k"] == "f16"
        assert row["plan"]["weights"] == "resident"
        assert row["avg_ttft_ns"] is None and row["read_bytes_per_token"] == 0
        assert (row["environment"]["disk"]["bytes_s"] > 0 and row["energy_source"] is None) or row["energy_rail"]
    assert rows[0]["reasons"]["avg_ttft_ns"] == "the model has no vocabulary"


def test_a_sweep_with_a_baseline_is_reported_and_drawn(tiny_model: Callable[..., Path], tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    model, report, drawing = str(tiny_model("llama")), tmp_path / "new" / "report", tmp_path / "drawing.png"
    assert main(["bench", model, "-p", "16", "-n", "4", "--memory", "1M,300M,400M", "--baseline", "llama.cpp",
                 "-o", "md", "--report", str(report), "--plot", str(drawing), *QUICK]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "| budget |" in lines[0] and "| engine |" in lines[0] and len(lines) == 2 + 8
    assert lines[2].startswith("| llama ") and "300.0 MiB | edgert | pp16 |" in lines[2]
    assert "the smallest that works" in err and str(report / "report.html") in err
    rows = json.loads((report / "results.json").read_text())
    jsonschema.validate(rows, SCHEMA)
    assert [row["ratio_to_baseline"] is None for row in rows] == [False, True] * 4
    assert rows[0]["ttft_n_prompt"] >= 16 and len(rows[0]["ttft_samples_ns"]) == 2
    assert drawing.read_bytes().startswith(b"\x89PNG")
    page = (report / "report.html").read_text()
    assert str(tmp_path) not in page and model not in page and Path(model).name in page
    assert os.uname().nodename not in page


def test_a_cluster_is_measured_as_it_answers(tiny_model: Callable[..., Path], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.cluster_processes import cluster

    model = str(tiny_model("qwen2", quantisation="F32", n_heads=8, n_kv_heads=4, head_dim=32, n_layers=4))
    with cluster(tmp_path, 1) as made:
        monkeypatch.setenv("EDGERT_HOME", str(made.leader_home))
        assert main(["bench", model, "-p", "8", "-n", "3", "-o", "jsonl", "--cluster", "--devices", "all", *QUICK]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    jsonschema.validate(rows, SCHEMA)
    assert [one["name"] for one in rows[0]["plan"]["cluster"]["devices"]][1:] == ["worker1"]
    assert all(row["cluster"] and row["reasons"]["predicted_ts"].startswith("a cluster") for row in rows)


def test_two_results_are_compared(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", model, "-p", "16", "-n", "0", "-o", "jsonl", *QUICK]) == 0
    path = tmp_path / "a.jsonl"
    path.write_text(capsys.readouterr().out)
    assert main(["bench", "--compare", str(path), str(path)]) == 0
    assert "pp16" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [
    (["-p", "0", "-n", "0"], "nothing to measure"), (["-p", "x"], "not a list of numbers"),
    (["-pg", "3"], "not two numbers"), (["-r", "0"], "-r/--repetitions"), (["-o", "xml"], "invalid choice"),
    (["--layout", "fast"], "not one of auto, plain, repack"), (["--memory", "lots"], "is not a size"),
    (["--threads", "0"], "whole number"), (["--context", "16", "-p", "64"], "does not hold a test of 128"),
    (["--limit"], "--memory"), (["--baselin", "llama.cpp"], "Did you mean --baseline"),
    (["--cooldown-to", "9000C"], "is not a temperature"), (["--delay", "-1"], "--delay"),
    (["--plot", "x.gif"], ".svg or .png"), (["--plot", "/no/such/place/x.svg"], "no such directory"),
    (["--report", "/proc/report"], "Name a directory that can be written"), (["--batch", "99999"], "--batch"),
    (["--compare", "a.json", "b.json"], "MODEL, or --compare"),
])
def test_senseless_wishes_are_refused_before_anything_is_measured(
        words: list[str], said: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", model, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and "Traceback" not in err


def test_a_model_that_is_not_there_and_a_budget_that_is_too_small(model: str,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "no-such-model"]) == 3
    assert "no model answers to" in capsys.readouterr().err
    assert main(["bench", model, "--memory", "1M", *QUICK]) == 5
    assert "the smallest that works is" in capsys.readouterr().err
    assert main(["bench"]) == 2
    assert "bench takes a MODEL" in capsys.readouterr().err


def test_a_limit_that_cannot_be_had_says_what_to_do(model: str, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("apps.bench.control_group.os.geteuid", lambda: 1000)
    assert main(["bench", model, "--memory", "300M", "--limit"]) == 2
    err = capsys.readouterr().err
    assert "--limit cannot be had here: only root" in err or "no memory control groups" in err
    assert "without --limit" in err


def test_a_system_without_a_thermometer_cannot_be_waited_for(model: str, monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("apps.bench.thermal.warmest_c", lambda sensors: None)
    assert main(["bench", model, "--cooldown-to", "50C"]) == 2
    assert "--delay" in capsys.readouterr().err


def test_ctrl_c_prints_what_is_done(tiny_model: Callable[..., Path]) -> None:
    model = str(tiny_model("llama", n_layers=8, context_length=32768))
    process = subprocess.Popen([sys.executable, "-c", _START, "bench", model, "-p", "8", "-n", "30000", "-o", "json",
                                *QUICK, "--log-json", "-v"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        while b'"test": "tg30000"' not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert [row["n_prompt"] for row in json.loads(out)] == [8]
    assert b"Traceback" not in err


def test_a_terminal_shows_a_table_and_the_time_that_is_left(model: str) -> None:
    with Terminal(["bench", model, "-p", "16", "-n", "4", *QUICK]) as terminal:
        assert terminal.wait() == 0
    shown: Any = terminal.screen
    assert "no budget; resident, 1 thread," in shown and "pp16" in shown and "tg4" in shown
