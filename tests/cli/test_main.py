from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Outcome, start

import edgert as package
from apps.cli import run
from apps.cli.main import main
from edgert import errors

Command = Callable[..., Outcome]
KINDS = {
    errors.EdgertError("m", "n"): 1, errors.UsageError("m", "n"): 2, errors.ModelNotFound("m", ("near",)): 3,
    errors.ModelFileError("m", "damaged"): 4, errors.UnsupportedArchitecture("m", "x", ("llama",)): 4,
    errors.TemplateError("m", "p"): 4, errors.OutOfMemory("m", 1): 5, errors.BudgetTooSmall("m", 3, 1, 2): 5,
    errors.ContextOverflow(9, 8): 6, errors.DownloadError("m", "n"): 7, errors.ChecksumMismatch("m", "a", "b"): 7,
    errors.NoSpace("m", 2, 1): 8, errors.NativeLibraryError("m", "n"): 9, errors.GrammarError("m", "n"): 10,
    errors.ComputeError("m", "n"): 11, errors.Interrupted("m", "n"): 130,
}


@pytest.mark.parametrize(("error", "status"), KINDS.items(), ids=lambda value: type(value).__name__)
def test_every_kind_of_error_has_its_exit_status_and_a_next_step(
        error: errors.EdgertError, status: int, edgert: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(run, "open_runtime", fails)
    outcome = edgert("run", "model", "prompt")
    assert outcome == Outcome(status, "", f"edgert: {error.message}\n{error.next_step}\n")
    as_json = json.loads(edgert("run", "model", "prompt", "--log-json").err)
    assert (as_json["exit_code"], as_json["message"], as_json["next_step"]) == (
        status, error.message, error.next_step)


def test_every_exit_status_is_documented(edgert: Command) -> None:
    documented = edgert("--help").out
    for status in {*KINDS.values(), 0, 143}:
        assert f" {status}" in documented.partition("exit status:")[2].replace(":", " ").replace("(", " ")


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["bench", "--help"], ["pull", "--help"],
                                   ["serve", "--help"], ["chat", "--help"]])
def test_help_fits_on_80_columns_and_succeeds(words: list[str], edgert: Command,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = edgert(*words)
    assert (outcome.status, outcome.err) == (0, "")
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_version_and_no_arguments(edgert: Command) -> None:
    assert edgert("--version") == Outcome(0, f"edgert {package.__version__}\n", "")
    nothing = edgert()
    assert (nothing.status, nothing.out) == (2, "")
    assert "usage: edgert" in nothing.err and "answer a prompt" in nothing.err


def test_models_that_are_missing_or_damaged_are_said_in_two_lines(edgert: Command, tmp_path: Path) -> None:
    outcome = edgert("run", "nosuch", "hi")
    assert (outcome.status, outcome.out) == (3, "")
    assert outcome.err.startswith("edgert: no model answers to 'nosuch'\n") and outcome.err.count("\n") == 2
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF\x03\0\0\0 and then nothing")
    outcome = edgert("run", damaged, "hi")
    assert outcome.status == 4 and outcome.err.count("\n") == 2


@pytest.mark.parametrize(("raised", "status", "said"), [
    (KeyboardInterrupt(), 130, "edgert: interrupted\n"),
    (MemoryError(), 5, "edgert: out of memory\n"),
    (BrokenPipeError(), 141, ""),
])
def test_what_python_raises_is_answered_in_words(raised: BaseException, status: int, said: str, edgert: Command,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise raised

    monkeypatch.setattr(run, "open_runtime", fails)
    outcome = edgert("run", "model", "prompt")
    assert (outcome.status, outcome.out) == (status, "")
    assert outcome.err.startswith(said) and bool(outcome.err) == bool(said)


def test_a_defect_is_one_line_and_its_traceback_comes_with_verbose(edgert: Command,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyError("two\nlines")

    monkeypatch.setattr(run, "open_runtime", fails)
    outcome = edgert("run", "model", "prompt")
    assert outcome.status == 1
    assert outcome.err == ("edgert: KeyError: 'two\\nlines'\n"
                           "This is a defect in edgert; run again with -v for details.\n")
    verbose = edgert("run", "model", "prompt", "-v").err
    assert "Traceback" in verbose and "in fails" in verbose and "run again" not in verbose
    assert "in fails" in json.loads(edgert("run", "model", "prompt", "-v", "--log-json").err)["traceback"]


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys; from apps.cli.main import main; main(['run', '--help']); main(['--help']); "
            "print('heavy:', [name for name in ('numpy', 'rich', 'ctypes', 'jinja2', 'psutil', 'urllib.request', "
            "'llama_cpp', 'edgert.runtime', 'asyncio', 'http.client', 'readline', 'starlette', 'uvicorn', 'sqlite3') "
            "if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("words", [["--help"], ["list", "--json"], ["run", "{model}", "hello", "--max-tokens", "9"]])
def test_a_reader_that_has_seen_enough_ends_the_command_silently(words: list[str], model: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = start([word.format(model=model) for word in words], env=environment)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.close()
    process.stdout.close()  # before the command has even started to write
    said = process.stderr.read()
    assert (process.wait(), said) == (141, b"")


def test_settings_for_the_libraries_do_not_override_the_users(edgert: Command,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_NO_BACKTRACE", "0")
    edgert("run", "nosuch", "hi")
    assert os.environ["GGML_NO_BACKTRACE"] == "0"


def test_main_takes_its_words_from_the_process(monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["edgert", "--version"])
    assert main() == 0
    assert capsys.readouterr().out
