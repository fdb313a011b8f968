from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from apps.bench.command import cpu_name
from apps.cli.main import main

# One thread: two would wait for each other at every operation whenever another program runs.
QUICK = ["--threads", "1", "--layout", "plain", "-r", "2"]
_START = "import sys; from apps.cli.main import main; sys.exit(main())"
DEADLINE_S = 120.0


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama", vocabulary=False))  # token ids are enough


def test_a_model_without_vocabulary_is_measured_at_a_depth(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", model, "-p", "16", "-n", "4", "-pg", "8,2", "-d", "0,32", "-o", "jsonl", *QUICK]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    assert [(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows] == [
        (16, 0, 0), (0, 4, 0), (8, 2, 0), (16, 0, 32), (0, 4, 32), (8, 2, 32)]
    for row in rows:
        assert len(row["samples_ns"]) == 2 and min(row["samples_ns"]) > 0
        assert row["model_filename"] == model and row["model_n_params"] > 0 and row["n_threads"] == 1
        assert row["model_type"].startswith("llama ") and row["type_k"] == "f16"


def test_the_default_output_is_a_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", model, "-p", "16", "-n", "0", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model") and "pp16 " in lines[2] and len(lines) == 3


@pytest.mark.parametrize(("words", "said"), [
    (["-p", "0", "-n", "0"], "nothing to measure"), (["-p", "x"], "not a list of numbers"),
    (["-pg", "3"], "not two numbers"), (["-r", "0"], "-r/--repetitions"), (["-o", "xml"], "invalid choice"),
])
def test_senseless_tests_are_refused(words: list[str], said: str, model: str,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", model, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err


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


def test_the_processors_name_is_found_or_its_architecture(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\nmodel name\t: other\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Fast CPU @ 3 GHz"
    assert cpu_name(tmp_path / "missing")
